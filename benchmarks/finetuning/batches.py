"""Batches of labelled proteins, and what a head says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import rd_torch
from benchmarks.finetuning.problem import Example, Problem, Scores
from rd_torch.backbone import is_residue, tokenize
from rd_torch.heads import Head
from rd_torch.levels import ALPHABET, SPECIAL_TOKENS
from rd_torch.sequences import cut_batches

Batch = tuple[Tensor, Tensor | None, Any]
"""What goes in, a mask of residues where features go in, and labels."""


class Batches(ABC):
    """Labelled proteins of a set, cut into batches; iterating yields functions that make a batch each.

    Args:
        problem: The problem.
        examples: The proteins.
        sizes: A sequence as long as each example is in the eyes of the budget.
        budget: Number of tokens in a batch, two special ones in each example counted.
    """

    def __init__(
        self, problem: Problem, examples: Sequence[Example], sizes: Iterable[str], budget: int
    ) -> None:
        self.problem = problem
        self.examples = examples
        self._batches = [[index for index, _ in batch] for batch in cut_batches(sizes, budget)]

    def __iter__(self) -> Iterator[Callable[[], Batch]]:
        for batch in self._batches:
            yield partial(self.make, batch)

    @abstractmethod
    def make(self, batch: Sequence[int]) -> Batch:
        """Make the batch of the examples with these numbers."""


class Features(Batches):
    """Batches of features that were computed once, for the baseline and the frozen head."""

    def __init__(self, problem: Problem, features: Sequence[Tensor], examples: Sequence[Example]) -> None:
        budget = problem.rows * (1 + SPECIAL_TOKENS if problem.pooled else 1)
        super().__init__(problem, examples, ("A" * len(each) for each in features), budget)
        self._features = features

    def make(self, batch: Sequence[int]) -> Batch:
        """Make the batch of the examples with these numbers."""
        padded = pad_sequence([self._features[index] for index in batch], batch_first=True)
        lengths = torch.tensor([len(self._features[index]) for index in batch])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        labels = self.problem.labels([self.examples[index].label for index in batch], mask)
        return padded, mask, labels


class Tokens(Batches):
    """Batches of tokens, for whatever trains the chain."""

    def __init__(self, problem: Problem, examples: Sequence[Example], tokens_per_batch: int) -> None:
        super().__init__(problem, examples, (each.sequence for each in examples), tokens_per_batch)

    def make(self, batch: Sequence[int]) -> Batch:
        """Make the batch of the examples with these numbers."""
        tokens = tokenize([self.examples[index].sequence for index in batch], ALPHABET)
        labels = [self.examples[index].label for index in batch]
        return tokens, None, self.problem.labels(labels, is_residue(tokens, ALPHABET))


def predict(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the predictions for a batch, and the mask that says where residues are."""
    inputs, mask, _ = batch
    if mask is None:
        return module(inputs)["predictions"], is_residue(inputs, ALPHABET)
    return module(inputs, mask), mask


@torch.no_grad()
def judge(problem: Problem, module: nn.Module, batches: Batches) -> Scores:
    """Return the scores of a head or a predictor on a set."""
    module.eval()
    head = head_of(module)
    rows, truth = [], []
    for make in batches:
        batch = make()
        predictions, mask = predict(module, batch)
        labelled = head.labelled(batch[2], mask)
        rows.append(predictions[labelled])
        truth.append(batch[2][labelled])
    return problem.scores(torch.cat(rows).float(), torch.cat(truth))


def head_of(module: nn.Module) -> Head:
    """Return the head of a predictor, or the head itself."""
    head = module.head if isinstance(module, rd_torch.Predictor) else module
    if not isinstance(head, Head):
        raise TypeError(f"expected a predictor with one head or a head, got {type(module).__name__}")
    return head
