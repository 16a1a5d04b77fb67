"""Ask a backbone for the letters at masked sites: questions in, log probabilities out, in packed batches."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from rd_torch.alphabet import Alphabet
from rd_torch.backbone import at_least_float32, is_residue
from rd_torch.batching import plan_batches, require_memory, run_batches
from rd_torch.disk import write_whole
from rd_torch.embedder import prepare_where_possible
from rd_torch.model import RDModel
from rd_torch.modules import evaluating
from rd_torch.nesting import fingerprint

HIDDEN: Final = "?"
"""The letter of a question that stands for `<mask>`."""

TOKENS_KEPT_TOGETHER: Final = 131_072
"""Number of tokens in the questions whose answers are kept in one file; a kill loses at most so many."""

Progress = Callable[[int, bool], object]
"""Is called with a number of questions that are done, and whether an earlier run did them."""


def hide(sequence: str, sites: Iterable[int]) -> str:
    """Return a sequence with `HIDDEN` at some sites."""
    letters = list(sequence)
    for site in sites:
        letters[site] = HIDDEN
    return "".join(letters)


class LanguageModel:
    """The language model of one level, which answers what letters it expects where.

    Only this level's backbone runs. It is shared with the model, not copied.

    Args:
        model: the chain.
        level: name of the level.
        folder: where answers are kept, so that a run that was interrupted goes on; None keeps none.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; by default as many
            as half of the free memory takes.
        progress: function that is called as questions are answered.

    Attributes:
        level: name of the level.

    Raises:
        ValueError: for a level that the chain does not have, and one of a hidden layer.
    """

    def __init__(
        self,
        model: RDModel,
        level: str,
        folder: Path | None = None,
        tokens_per_batch: int | None = None,
        progress: Progress = lambda questions, before: None,
    ) -> None:
        if not model.config.level(level).is_last:
            raise ValueError(
                f"expected a level that is the last layer of its backbone, whose language-model head takes "
                f"nothing else, got {level}"
            )
        self.level = level
        self._model = RDModel({level: model.family()[level]}, [])
        self._folder, self._asked_budget, self._progress = folder, tokens_per_batch, progress
        self._alphabet = _with_hidden(model.alphabet)
        self._facts: bytes = b""

    def letters(self, text: str) -> list[int]:
        """Return the ids of letters, by which answers are indexed."""
        return [self._alphabet.tok_to_idx[letter] for letter in text]

    def ask(self, questions: Iterable[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Answer questions.

        Args:
            questions: sequences with `HIDDEN` at some sites; they are read as they are needed.

        Yields:
            The number of each question, in any order, and `(sites, tokens)` log probabilities, of each token
            of the alphabet at each hidden site, or at each residue where none is hidden. They are float64
            numbers with the precision of the model, float32 at the least.

        Raises:
            ValueError: for a backbone without a language-model head, and one that gives no numbers.
        """
        budget, device = plan_batches(self._model.family().values(), self._asked_budget)
        start = 0
        for chunk in _cut(questions):
            kept = None if self._folder is None else self._folder / f"{self._key(chunk)}.npz"
            if kept is not None and kept.is_file():
                answers = _read(kept)
                self._progress(len(answers), True)
            else:
                answers = self._answer(chunk, budget, device)
                if kept is not None:
                    write_whole(kept, _writer(answers))
            yield from ((start + number, answer) for number, answer in enumerate(answers))
            start += len(chunk)

    def _answer(self, chunk: Sequence[str], budget: int, device: torch.device) -> list[np.ndarray]:
        """Run the backbone on questions, and return the answers in their order."""
        answers: dict[int, np.ndarray] = {}
        with evaluating(self._model):
            prepare_where_possible(self._model)
            for batch in run_batches(self._compute, chunk, self._alphabet, budget, device):
                answers |= zip(batch.indices, batch.result, strict=True)
                self._progress(len(batch.indices), False)
        return [answers[number] for number in range(len(chunk))]

    @torch.inference_mode()
    def _compute(self, tokens: Tensor) -> list[np.ndarray]:
        """Return the answer of each row of a batch."""
        require_memory(self._model.family().values(), tokens)
        logits = self._model(tokens).logits
        if logits is None:
            raise ValueError(
                f"expected a backbone with a language-model head at level {self.level}, got one without: "
                "take the model's own file, which has the head"
            )
        hidden = tokens == self._alphabet.mask_idx
        asked = torch.where(hidden.any(1, keepdim=True), hidden, is_residue(tokens, self._alphabet))
        scores = logits[asked]
        answers = scores.to(at_least_float32(scores.dtype)).log_softmax(-1).double().cpu().numpy()
        if not np.isfinite(answers).all():
            raise ValueError(
                f"expected finite probabilities of level {self.level}, got NaN or infinity: compute in "
                "float32"
            )
        return np.split(answers, asked.sum(1).cumsum(0).cpu()[:-1].numpy())

    def _key(self, chunk: Sequence[str]) -> str:
        """Return a name for the answers to some questions, by all that they depend on."""
        if not self._facts:
            (backbone,) = self._model.family().values()
            tensors = fingerprint(self._model.config, {"backbone.": backbone.tensors()})
            self._facts = f"{tensors} {backbone.dtype}".encode()
        checksum = hashlib.blake2b(self._facts, digest_size=16)
        for question in chunk:
            checksum.update(f"\n{question}".encode())
        return checksum.hexdigest()


def _with_hidden(alphabet: Alphabet) -> Alphabet:
    """Return an alphabet in which `HIDDEN` is the letter of `<mask>`, as it is in no sequence."""
    ours = copy.copy(alphabet)
    ours.tok_to_idx = {**alphabet.tok_to_idx, HIDDEN: alphabet.mask_idx}
    return ours


def _cut(questions: Iterable[str]) -> Iterator[list[str]]:
    """Cut questions into parts of about `TOKENS_KEPT_TOGETHER` tokens; the same ones give the same parts."""
    waiting = iter(questions)
    while first := next(waiting, ""):
        yield [first, *islice(waiting, max(1, TOKENS_KEPT_TOGETHER // len(first)) - 1)]


def _writer(answers: Sequence[np.ndarray]) -> Callable[[Path], None]:
    """Make a function that writes answers to a file."""

    def write(path: Path) -> None:
        """Write them, one behind the other, with the number of sites of each."""
        with path.open("wb") as file:
            np.savez(file, rows=np.concatenate(answers), sites=[len(answer) for answer in answers])

    return write


def _read(path: Path) -> list[np.ndarray]:
    """Read answers that were kept."""
    with np.load(path, allow_pickle=False) as kept:
        return np.split(kept["rows"], kept["sites"].cumsum()[:-1])
