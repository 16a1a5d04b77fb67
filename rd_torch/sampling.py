"""`Sample`: the vectors of a store that a picture shows, with what the picture says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from rd_torch.choices import Scale
from rd_torch.store import Length, Store

MOST_RECORDS: Final = 5_000
"""Most records that a picture shows; more points would hide each other and take longer to draw."""

RECORDS_READ: Final = 100
"""Number of records that are read at once, to bound the memory that records of residues take."""


@dataclass(frozen=True)
class Sample:
    """The vectors of a store that a picture shows.

    Attributes:
        name: file name of the store.
        vectors: `(records, width)` vectors in float64; means where the store has a vector for each residue.
        lengths: number of residues of each record; None for a record whose length the store does not say.
        total: number of records in the store.
        step: distance between records that were taken, 1 where all of them were.
        levels: width at which each level's features end, by level; empty where the store does not say it.
        model: name of the model that made the store; empty where the store does not say it.
        averaged: whether the vectors are means that were taken here.
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
        """The number of features of a vector."""
        return self.vectors.shape[1]

    @property
    def has_lengths(self) -> bool:
        """Whether the length of every record is known."""
        return all(self.lengths)

    @property
    def title(self) -> str:
        """A line that says what the picture shows."""
        made = f" by {self.model}" if self.model else ""
        return f"{self.name}: {self.total:,} proteins, {self.width:,} features{made}"

    @property
    def caption(self) -> str:
        """A line that says what was left out or averaged; empty where nothing was."""
        notes = []
        if self.step > 1:
            notes.append(f"a sample of {len(self.vectors):,} records is drawn, one of every {self.step:,}")
        if self.averaged:
            notes.append("vectors are averages over residues")
        return "; ".join(notes)


def read_sample(store: Store) -> Sample:
    """Read an evenly spread sample of a store's records.

    Args:
        store: the store.

    Returns:
        The sample.

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
            rows.append(
                exact.mean(0) if exact.ndim > 1 else exact[: store.width]
            )  # of several ways to pool, the first
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


def scale_features(sample: Sample, scale: Scale) -> np.ndarray:
    """Scale a sample's vectors by what its features deviate, so that added features count in distances.

    Args:
        sample: the sample.
        scale: `"none"`; `"feature"` to divide each feature by its standard deviation, or `"block"` to divide
            the features that one level adds by the root of their mean variance.

    Returns:
        `(records, width)` vectors. What does not vary is left as it is.
    """
    if scale == "none":
        return sample.vectors
    variances = sample.vectors.var(0)
    if scale == "block":
        blocks = np.split(variances, list(sample.levels.values())[:-1])
        variances = np.concatenate([np.full_like(block, block.mean()) for block in blocks])
    return sample.vectors / np.sqrt(np.where(variances > 0, variances, 1))


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the first two principal components.

    Args:
        vectors: `(records, width)` vectors in float64.

    Returns:
        `(records, 2)` coordinates along the components, and the `(2,)` shares of variance that these explain.
    """
    centred = vectors - vectors.mean(0)
    wide = vectors.shape[1] > len(vectors)  # then the matrix of inner products is the smaller one
    values, directions = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, directions = np.maximum(values[::-1][:2], 0), directions[:, ::-1][:, :2]
    points = directions * np.sqrt(values) if wide else centred @ directions
    points *= np.where(
        points.max(0) < -points.min(0), -1, 1
    )  # signs are arbitrary: the farthest point is positive
    missing = 2 - len(values)  # a single feature has one component
    shares = np.pad(values, (0, missing)) / max(np.square(centred).sum(), np.finfo(float).tiny)
    return np.pad(points, ((0, 0), (0, missing))), shares
