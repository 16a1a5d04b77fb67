"""Stores of as many vectors as one likes, drawn around those of natural proteins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple, Self

import faiss
import numpy as np
import torch

from rd_torch.sequences import WINDOW_BATCHES
from rd_torch.store import Facts, Length, Record, Row, Window, Work, gather, load_format, open_store

SEED: Final = 21
QUERIES: Final = 1_000


def units(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the directions of vectors from a mean, whose products are similarities."""
    centred = vectors - mean
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


class Natural(NamedTuple):
    """Natural proteins, of which some are kept as queries.

    Attributes:
        facts: What they were embedded with.
        queries: `(queries, width)` vectors of those that are kept as queries, evenly spread.
        centres: `(proteins, width)` vectors of the others, around which others are drawn.
        lengths: Number of residues of these.
        likeness: Median similarity of a query to the nearest of the others.
    """

    facts: Facts
    queries: np.ndarray
    centres: np.ndarray
    lengths: list[Length]
    likeness: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the vectors of a store that rd_torch wrote."""
        with open_store(path) as store:
            assert store.facts is not None
            facts, vectors, lengths = store.facts, np.asarray(store, np.float32), store.lengths()
        places = np.linspace(0, len(vectors) - 1, min(QUERIES, len(vectors) // 2)).astype(int)
        kept = np.ones(len(vectors), bool)
        kept[places] = False
        queries, centres = vectors[places], vectors[kept]
        one, other = (units(each, centres.mean(0)) for each in (queries, centres))
        nearest, _ = faiss.knn(one, other, 1, metric=faiss.METRIC_INNER_PRODUCT)
        lengths = [length for length, is_kept in zip(lengths, kept, strict=True) if is_kept]
        return cls(facts, queries, centres, lengths, float(np.median(nearest)))

    @property
    def share(self) -> float:
        """The share of their covariance that is drawn around each of them.

        A vector is then as similar to the one that it is drawn around as natural proteins are to the nearest
        of them: the cosine of x and x + e is 1 / sqrt(1 + share) where the covariance of e is that share.
        """
        return 1 / self.likeness**2 - 1


def write_store(natural: Natural, path: Path, count: int) -> None:
    """Write a Parquet store of drawn vectors in float16, window by window as embedding does.

    Args:
        natural: The proteins around which vectors are drawn, each as likely as another.
        path: The store.
        count: Number of vectors.
    """
    facts = replace(natural.facts, save_dtype="float16")
    variances, directions = np.linalg.eigh(natural.share * np.cov(natural.centres.T))
    spread = (directions * np.sqrt(variances.clip(min=0))).astype(np.float32)
    lengths = natural.lengths

    def records() -> Iterator[Record[int]]:
        """Yield a record for each vector, as large as one of a protein of its length."""
        for number in range(count):
            length = lengths[number % len(lengths)]
            name = f"S{number:08d}"
            yield Record(name, number, length, (length or 0) + 2, [name.encode()])

    def draw(window: Window[int], _: dict[int, str]) -> Iterator[list[Row]]:
        """Draw the vectors of a window."""
        random = np.random.default_rng((SEED, window.number))
        around = natural.centres[random.integers(len(natural.centres), size=len(window.names))]
        noise = random.standard_normal(around.shape, np.float32) @ spread.T
        yield list(enumerate(torch.from_numpy((around + noise).astype(np.float16))))

    with Work(path, load_format("parquet"), facts) as work:
        windows = gather(records(), WINDOW_BATCHES * facts.tokens_per_batch, None, "vectors")
        work.fill(windows, draw, lambda *_: None)
