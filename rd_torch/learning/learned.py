"""`Learned`: a head on nested features, its folder, and its predictions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from rd_torch.disk import move, part_folder, require_folder
from rd_torch.embedding import embed
from rd_torch.learning.card import card_of, table_of
from rd_torch.learning.curve import can_draw, draw_widths
from rd_torch.learning.estimators import FittedHead
from rd_torch.learning.findings import Findings
from rd_torch.learning.prediction import Prediction
from rd_torch.letters import Corrections
from rd_torch.model import RDModel
from rd_torch.pooling import cut_ways
from rd_torch.reading import Proteins, entries_of, sequences_of
from rd_torch.sequences import Entry, normalize_entries, require_sound

CONFIG: Final = "config.json"
HEAD: Final = "head.safetensors"
WIDTHS: Final = "widths.tsv"
PICTURE: Final = "widths.png"
CARD: Final = "README.md"

RECORDS_AT_ONCE: Final = 512
"""Number of records that are embedded, or read from a store, before their predictions are given."""

HALF: Final = 0.5


@dataclass(frozen=True)
class Learned:
    """A predictor: a head that was learnt on nested embeddings, and what it must know to predict.

    `rd_torch.learn` makes one, `load` reads one. Its folder holds `config.json`, `head.safetensors`, a card
    `README.md`, and the scores of all widths as `widths.tsv` and, where matplotlib is installed, as
    `widths.png`; no pickle.

    Attributes:
        findings: what it is and how it was found.
        head: the head.

    Examples:
        >>> import random
        >>> draw = random.Random(0)
        >>> sequences = ["".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=30)) for _ in range(60)]
        >>> table = {"sequence": sequences, "lysines": [each.count("K") for each in sequences]}
        >>> learned = rd_torch.learn(table, "lysines")
        >>> learned.save("lysines")
        >>> list(rd_torch.Learned.load("lysines").predict(["MKV"])) == list(learned.predict(["MKV"]))
        True
    """

    findings: Findings
    head: FittedHead

    def save(self, folder: str | Path) -> None:
        """Write the predictor to a folder, which is whole or not there.

        Args:
            folder: the folder; nothing may be there.

        Raises:
            FileNotFoundError: if the folder that it shall lie in is not there.
            FileExistsError: where something is there.
        """
        place = Path(folder)
        require_free(place)
        part = place.with_name(f".{place.name}.part")
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        try:
            arrays = {name: np.ascontiguousarray(array) for name, array in self.head.tensors.items()}
            save_file(arrays, part / HEAD)
            (part / WIDTHS).write_text(table_of(self.findings))
            (part / CARD).write_text(card_of(self.findings, place.resolve().name))
            if can_draw():
                draw_widths(self.findings, part / PICTURE)
            (part / CONFIG).write_text(self.findings.to_json())
            (part / HEAD).chmod((part / CONFIG).stat().st_mode)  # safetensors lets the owner alone read it
            move(part, place)
        finally:
            if part.exists():
                shutil.rmtree(part)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a predictor.

        Args:
            folder: its folder.

        Returns:
            The predictor. It gives the same numbers as the one that was saved.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: for files that are no predictor's, or broken.
        """
        place = Path(folder)
        if not (place / CONFIG).is_file():
            raise FileNotFoundError(f"expected a predictor at {place}, got no {CONFIG} there")
        findings = Findings.from_json((place / CONFIG).read_text(), place / CONFIG)
        try:
            tensors = load_file(place / HEAD)
        except Exception as error:  # safetensors has an error of its own, and says so in no base class
            raise ValueError(f"expected the head of a predictor at {place / HEAD}, got {error}") from error
        head = FittedHead(findings.head, findings.task, tensors)
        try:
            outputs = head(np.zeros((1, len(tensors["mean"])))).shape[1]
        except (KeyError, ValueError) as error:
            raise ValueError(f"expected the tensors of a {findings.head} head at {place / HEAD}") from error
        if outputs != max(1, len(findings.classes)) or not all(map(_is_finite, tensors.values())):
            raise ValueError(f"expected finite tensors that fit {CONFIG} in {place}, got others")
        return cls(findings, head)

    def load_model(self, model: str | None = None, device: torch.device | str | None = None) -> RDModel:
        """Load the chain up to the level that the head needs, and nothing beyond.

        Args:
            model: where the chain is now; by default where it was.
            device: device to put it on; by default the CPU.

        Returns:
            The chain.

        Raises:
            ValueError: where the chain has no name, or is another one.
        """
        name = model or self.findings.model
        if not name:
            raise ValueError(
                "expected the name of the chain, got a predictor of a chain without one: name it"
            )
        dtype = getattr(torch, self.findings.dtype)
        loading = self.findings.loading
        return self.require_model(
            RDModel.from_pretrained(name, self.findings.level, dtype, device, **loading)
        )

    def require_model(self, model: RDModel) -> RDModel:
        """Require that a chain begins with the one that the head was learnt on.

        Args:
            model: the chain.

        Returns:
            The part of it that runs.

        Raises:
            ValueError: for another chain.
        """
        level = self.findings.level
        model.config.require_level(level)
        needed = model if list(model.config.widths)[-1] == level else model.truncate(level)
        found = needed.fingerprint()
        if found != self.findings.fingerprint:
            raise ValueError(
                f"expected the chain that was learnt on, {self.findings.model or 'which has no name'}, "
                f"up to {level} (fingerprint {self.findings.fingerprint}), got another one ({found})"
            )
        return needed

    def predict(
        self, proteins: Iterable[Any], *, model: RDModel | None = None, tokens_per_batch: int | None = None
    ) -> Iterator[Prediction]:
        """Predict proteins as they come; only the backbones that the head needs run.

        Args:
            proteins: sequences, as `rd_torch.embed` takes them, or records, as for `embed_to_store`.
            model: the chain; by default it is loaded by its name.
            tokens_per_batch: number of tokens that a batch holds at most, as in `rd_torch.embed`.

        Yields:
            The prediction of each protein, or of each of its residues, in order.

        Raises:
            TypeError: for anything else than sequences or records.
            ValueError: for a record that is no sequence, and a chain that is another one.
        """
        needed = self.load_model() if model is None else self.require_model(model)
        corrections = Corrections()
        entries = normalize_entries(_entries(proteins), corrections, kind=needed.alphabet.kind)
        pool, width = self.findings.pool, self.findings.width
        sound = require_sound(entries)
        while window := list(islice(sound, RECORDS_AT_ONCE)):
            sequences = [each.sequence for each in window]
            rows = embed(needed, sequences, pool=pool, width=width, tokens_per_batch=tokens_per_batch)
            yield from self.of_vectors([each.identifier for each in window], rows)
        corrections.warn()

    def of_vectors(
        self, identifiers: Sequence[str], vectors: np.ndarray | Sequence[np.ndarray]
    ) -> Iterator[Prediction]:
        """Predict from embeddings of the predictor's chain and pooling, of its width or wider.

        Args:
            identifiers: identifiers of the proteins.
            vectors: their embeddings; per residue an array `(residues, features)` for each.

        Yields:
            The prediction of each protein, or of each of its residues.
        """
        pool, width = self.findings.pool, self.findings.width
        if not self.findings.per_residue:
            outputs = self.head(cut_ways(np.asarray(vectors), width, pool))
            for identifier, output in zip(identifiers, outputs, strict=True):
                yield self._prediction(identifier, output, None)
            return
        for identifier, rows in zip(identifiers, vectors, strict=True):
            for place, output in enumerate(self.head(rows[:, :width]), start=1):
                yield self._prediction(identifier, output, place)

    def _prediction(self, identifier: str, output: np.ndarray, position: int | None) -> Prediction:
        """Return what is predicted, from the outputs of the head."""
        findings = self.findings
        if findings.task == "regression":
            value, spread = float(output[0]), findings.spread or 0.0
            return Prediction(identifier, value, position, value - spread, value + spread)
        shares = {name: float(share) for name, share in zip(findings.classes, output, strict=True)}
        if findings.task == "multilabel":
            labels = tuple(name for name, share in shares.items() if share >= HALF)
            return Prediction(identifier, labels, position, probabilities=shares)
        best = int(output.argmax())
        place = int(np.searchsorted(findings.confidences, float(output[best]), side="right")) - 1
        right = findings.right[max(0, place)]
        return Prediction(identifier, findings.classes[best], position, right=right, probabilities=shares)


def require_free(place: Path) -> None:
    """Require that nothing is where a predictor will be written, and that its folder is there.

    Args:
        place: folder of the predictor.

    Raises:
        FileNotFoundError: if the folder that it shall lie in is not there.
        FileExistsError: where something is there.
    """
    require_folder(place)
    if place.exists():
        raise FileExistsError(f"expected nothing at {place}, got something: remove it or take another name")


def work_folder(place: Path) -> Path:
    """Return the folder in which work on an output lies until it is whole, and make it."""
    folder = part_folder(place)
    folder.mkdir(exist_ok=True)
    return folder


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _entries(proteins: Any) -> Iterator[Entry]:
    """Return records; sequences without identifiers are numbered from 1."""
    if isinstance(proteins, Proteins):
        return proteins.entries()
    sequences_of(proteins)  # refuses what is neither sequences nor records
    items = iter(proteins)
    first = list(islice(items, 1))
    together = chain(first, items)
    if any(isinstance(each, tuple | list) or type(each).__module__ == "Bio.SeqRecord" for each in first):
        return entries_of(together)
    numbered = enumerate(sequences_of(together), start=1)
    return (Entry(str(number), each, "", number) for number, each in numbered)
