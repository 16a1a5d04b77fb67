"""Token batches that are made before any clock runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rd_torch.backbone import tokenize
from rd_torch.levels import ALPHABET, SPECIAL_TOKENS
from rd_torch.sequences import cut_batches

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
QUANTILES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)


@dataclass(frozen=True)
class Batch:
    """A padded batch on the device.

    Attributes:
        tokens: `(batch, time)` token ids.
        mask: `(batch, time)`, 1 at real tokens and 0 at padding, as transformers wants it.
        real: Number of tokens that are no padding, `<cls>` and `<eos>` counted.
    """

    tokens: Tensor
    mask: Tensor
    real: int

    @classmethod
    def of(cls, sequences: Sequence[str], device: str) -> Batch:
        """Return the batch of normalised sequences."""
        tokens = tokenize(sequences, ALPHABET)
        real = tokens != ALPHABET.padding_idx
        return cls(tokens.to(device), real.long().to(device), int(real.sum()))

    @classmethod
    def of_size(cls, sequences: int, residues: int, device: str) -> Batch:
        """Return a batch of so many sequences of so many residues each, without padding."""
        return cls.of([LETTERS[k % len(LETTERS)] * residues for k in range(sequences)], device)


def sample(lengths: str, tokens: int, largest_budget: int, proteins: Sequence[str]) -> list[list[str]]:
    """Return groups of sequences of alike lengths.

    Args:
        lengths: `"validation"` for proteins as they come, a range such as `"100-500"` for those of so many
            residues, or a number for random sequences of so many residues.
        tokens: Number of tokens of all groups together, about.
        largest_budget: Number of tokens that each group has at least, if there are as many.
        proteins: Natural proteins to choose from.
    """
    if lengths.isdecimal():
        rng, size = random.Random(0), int(lengths)
        count = max(2, round(tokens / (size + SPECIAL_TOKENS)))
        return [["".join(rng.choices(LETTERS, k=size)) for _ in range(count)]]
    low, high = (1, sys.maxsize) if lengths == "validation" else map(int, lengths.split("-"))
    ranked = sorted((protein for protein in proteins if low <= len(protein) <= high), key=len)
    wanted = max(tokens // len(QUANTILES), largest_budget)
    groups = []
    for quantile in QUANTILES:
        middle = int(quantile * len(ranked))
        count = min(len(ranked), max(1, round(wanted / (len(ranked[middle]) + SPECIAL_TOKENS))))
        start = min(max(0, middle - count // 2), len(ranked) - count)
        groups.append(ranked[start : start + count])
    return groups


def batches_of(groups: Sequence[Sequence[str]], budget: int, device: str) -> list[Batch]:
    """Cut each group into batches of at most `budget` tokens, as `embed` and `fit` cut their sequences."""
    cut = (batch for group in groups for batch in cut_batches(group, budget))
    return [Batch.of([sequence for _, sequence in batch], device) for batch in cut]
