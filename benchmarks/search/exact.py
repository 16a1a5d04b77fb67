"""The exact search, and how much of it other ways find."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import faiss
import numpy as np

FOUND = (1, 10, 100)
"""Numbers of nearest proteins of which the recall is given."""

ROUNDING = 1e-6
"""Difference between cosines that float32 does not tell apart."""

QUERIES_AT_ONCE = 100

Draw = Callable[[np.ndarray, int], np.ndarray]


class Exact(NamedTuple):
    """Queries and proteins as directions from the mean of the proteins, and what is nearest.

    Attributes:
        queries: `(queries, width)` directions, in float64.
        proteins: `(proteins, width)` directions, in float64.
        least: `(queries, 3)` cosines of the nearest protein, the tenth and the hundredth.
    """

    queries: np.ndarray
    proteins: np.ndarray
    least: np.ndarray

    @classmethod
    def of(cls, queries: np.ndarray, proteins: np.ndarray) -> Exact:
        """Compare each query with every protein, in float64.

        Args:
            queries: `(queries, width)` vectors.
            proteins: `(proteins, width)` vectors, at least 100.
        """
        mean = proteins.mean(0, dtype=np.float64)
        one, other = (directions(each, mean) for each in (queries, proteins))
        least = []
        for start in range(0, len(one), QUERIES_AT_ONCE):
            cosines = one[start : start + QUERIES_AT_ONCE] @ other.T
            best = -np.sort(-np.partition(cosines, -max(FOUND), axis=1)[:, -max(FOUND) :], axis=1)
            least.append(best[:, [count - 1 for count in FOUND]])
        return cls(one, other, np.concatenate(least))

    def cosines(self, found: np.ndarray) -> np.ndarray:
        """Return `(queries, found)` cosines of queries and the proteins at `(queries, found)` places."""
        parts = []
        for start in range(0, len(found), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            parts.append(np.einsum("qw,qfw->qf", self.queries[rows], self.proteins[found[rows]]))
        return np.concatenate(parts)

    def recalls(self, found: np.ndarray) -> list[np.ndarray | None]:
        """Return the share of the nearest 1, 10 and 100 proteins that were found, for each query.

        A protein counts as one of the nearest if it is as near as the last of them, up to the rounding of
        float32, so that ties do no harm.

        Args:
            found: `(queries, found)` different places, nearest first.

        Returns:
            `(queries,)` shares for each number; None where fewer were found.
        """
        cosines = self.cosines(found)
        return [
            (cosines[:, :count] >= self.least[:, [column]] - ROUNDING).mean(1)
            if count <= found.shape[1]
            else None
            for column, count in enumerate(FOUND)
        ]

    def by_codes(self, projection: np.ndarray, count: int) -> np.ndarray:
        """Return the `(queries, count)` places of the proteins that are nearest after a projection.

        Args:
            projection: `(width, features)`, which maps directions to codes.
            count: Number of proteins to find.
        """
        codes, asked = ((each @ projection).astype(np.float32) for each in (self.proteins, self.queries))
        for each in (codes, asked):
            faiss.normalize_L2(each)
        scan = faiss.IndexFlatIP(codes.shape[1])
        scan.add(codes)
        return scan.search(asked, count)[1]

    def in_order(self, found: np.ndarray) -> np.ndarray:
        """Return found places in the order of the exact cosines, as a second stage does."""
        return np.take_along_axis(found, np.argsort(-self.cosines(found), axis=1, kind="stable"), axis=1)


def directions(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return directions of vectors from a mean, of length 1, in float64."""
    centred = vectors.astype(np.float64) - mean
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def random_projections(width: int, features: int, draws: int) -> list[np.ndarray]:
    """Return Gaussian projections, each of `(width, features)`."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal((width, features)) for _ in range(draws)]


def principal_components(proteins: np.ndarray, features: int) -> np.ndarray:
    """Return `(width, features)`: the leading principal directions of vectors from their mean."""
    return np.linalg.eigh(np.cov(proteins.T))[1][:, ::-1][:, :features]
