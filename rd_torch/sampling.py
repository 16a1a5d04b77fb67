"""`Sample`: what a picture of a store is drawn of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from rd_torch.store import Store
from rd_torch.store.windows import Length

MOST_RECORDS: Final = 5_000
"""Records that a picture shows; of more an evenly spread sample is drawn."""

RECORDS_READ: Final = 100
"""Records that are read at once."""


@dataclass(frozen=True)
class Sample:
    """What a picture is drawn of.

    Attributes:
        name: of the store.
        vectors: `(records, width)` in float64, averaged over residues where the store is not.
        lengths: residues of the records.
        total: records of the store.
        step: every how many-th of them is here.
        levels: where each level's features end, by level; empty where the store does not say it.
        model: what made the store, in words; empty likewise.
        averaged: whether vectors are means that were taken here.
    """

    name: str
    vectors: np.ndarray
    lengths: list[Length]
    total: int
    step: int
    levels: Mapping[str, int]
    model: str
    averaged: bool

    @property
    def width(self) -> int:
        """Features of a vector."""
        return self.vectors.shape[1]

    @property
    def has_lengths(self) -> bool:
        """Whether the residues of every record are known."""
        return all(self.lengths)

    @property
    def title(self) -> str:
        """What the picture shows, in one line."""
        made = f" by {self.model}" if self.model else ""
        return f"{self.name}: {self.total:,} proteins, {self.width:,} features{made}"

    @property
    def caption(self) -> str:
        """What was left out or averaged, in one line; empty where nothing was."""
        said = []
        if self.step > 1:
            said.append(f"a sample of {len(self.vectors):,} records is drawn, one of every {self.step:,}")
        if self.averaged:
            said.append("vectors are averages over residues")
        return "; ".join(said)


def sample_of(store: Store) -> Sample:
    """An evenly spread sample of a store's records.

    Raises:
        ValueError: for fewer than two records.
    """
    total = len(store)
    if total < 2:
        raise ValueError(f"expected at least two records to draw, got {total} in {store.path}")
    step = -(-total // MOST_RECORDS)
    rows: list[np.ndarray] = []
    lengths: list[Length] = [] if store.pool == "none" else store.lengths(slice(0, None, step))
    for start in range(0, total, step * RECORDS_READ):
        for row in store.read(slice(start, start + step * RECORDS_READ, step)):
            exact = np.asarray(row, np.float64)
            rows.append(exact.mean(0) if exact.ndim > 1 else exact[: store.width])  # the first way to pool
            lengths += [len(exact)] if exact.ndim > 1 else []
    facts = store.facts
    return Sample(
        name=store.path.name,
        vectors=np.stack(rows),
        lengths=lengths,
        total=total,
        step=step,
        levels=dict(zip(facts.levels, facts.widths, strict=True)) if facts else {},
        model=Path(facts.model).name if facts else "",
        averaged=store.pool == "none",
    )


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the first two principal components, `(records, 2)`, and their shares of variance."""
    centred = vectors - vectors.mean(0)
    wide = vectors.shape[1] > len(vectors)
    values, directions = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, directions = np.maximum(values[::-1][:2], 0), directions[:, ::-1][:, :2]
    points = directions * np.sqrt(values) if wide else centred @ directions
    points *= np.where(points.max(0) < -points.min(0), -1, 1)  # signs are arbitrary: the farthest is positive
    missing = 2 - len(values)  # of a single feature there is one
    shares = np.pad(values, (0, missing)) / max(np.square(centred).sum(), np.finfo(float).tiny)
    return np.pad(points, ((0, 0), (0, missing))), shares
