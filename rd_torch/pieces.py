"""`Pieces`: cut a long sequence into overlapping pieces, and blend their embeddings residue by residue."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rd_torch.pooling import pool_residues, pools_of


class Pieces(NamedTuple):
    """How a sequence that is longer than a model was trained for is cut, and its embedding put together.

    Pieces of `length` residues begin every `length - overlap` residues; the last piece ends with the sequence
    and overlaps more. A residue that several pieces cover gets the weighted mean of its embeddings. Weights
    fall evenly towards the ends of a piece, `w = min(i, length + 1 - i)` for residue i = 1, 2, ..., because
    residues near an end were computed without their neighbours. The weights of a residue sum to one, so that
    it makes no difference whether raw embeddings are blended and then mapped or mapped and then blended. Each
    feature is blended by itself, so that prefixes stay prefixes.

    Attributes:
        length: number of residues in a piece; sequences up to this length stay whole.
        overlap: number of residues that neighbouring pieces share.
    """

    length: int
    overlap: int

    @classmethod
    def of(cls, given: int | tuple[int, int], pool: str = "mean") -> Pieces:
        """Make pieces of what the option `windows` says.

        Args:
            given: the length of a piece, of which a quarter overlaps; or the length and the overlap.
            pool: ways to pool the blended residues, as `pool_name` joins them.

        Returns:
            The pieces.

        Raises:
            ValueError: for a length below 1, an overlap that is negative or no shorter than a piece, or a way
                to pool that takes `<cls>`.
        """
        if "cls" in pools_of(pool):
            raise ValueError(
                "expected a pool over residues with windows, got 'cls': every piece has a <cls> of its own"
            )
        length, overlap = given if isinstance(given, tuple) else (given, given // 4)
        if length < 1 or not 0 <= overlap < length:
            raise ValueError(
                "expected windows of at least 1 residue with an overlap from 0 to below their length, got "
                f"{length} with {overlap}"
            )
        return cls(length, overlap)

    def starts(self, residues: int) -> list[int]:
        """Return the residue, from 0, at which each piece of a sequence of so many residues begins."""
        if residues <= self.length:
            return [0]
        last = residues - self.length
        return [*range(0, last, self.length - self.overlap), last]

    def weights(self, residues: int) -> Tensor:
        """Return `(pieces, length)` float64 weights, which sum to one at every residue of the sequence."""
        starts, length = self.starts(residues), min(self.length, residues)
        place = torch.arange(1, length + 1, dtype=torch.float64)
        ramp = torch.minimum(place, length + 1 - place)
        sums = torch.zeros(residues, dtype=torch.float64)
        for start in starts:
            sums[start : start + length] += ramp
        return torch.stack([ramp / sums[start : start + length] for start in starts])


class Blend:
    """The embedding of one sequence, to which pieces are added in any order.

    Args:
        pieces: how the sequence was cut.
        residues: number of residues in the sequence.
        pool: ways to pool residues, as `pool_name` joins them. For `"mean"` only the sum over residues is
            kept in memory, otherwise all of them are.
    """

    def __init__(self, pieces: Pieces, residues: int, pool: str) -> None:
        starts = pieces.starts(residues)
        self._weights = dict(zip(starts, pieces.weights(residues), strict=True))
        self._residues, self._pool = residues, pool
        self._sum: Tensor | None = None
        self._dtype = torch.float32

    def add(self, start: int, rows: Tensor) -> None:
        """Add `(length, width)` embeddings of the piece that begins at residue `start`, from 0."""
        weighted = rows.double() * self._weights.pop(start)[:, None]
        self._dtype = rows.dtype
        if self._sum is None:
            self._sum = torch.zeros(1 if self._pool == "mean" else self._residues, rows.shape[1]).double()
        if self._pool == "mean":  # added row after row, so that the mean of a prefix is a prefix of the mean
            self._sum.index_add_(0, torch.zeros(len(rows), dtype=torch.long), weighted)
        else:
            self._sum[start : start + len(rows)] += weighted

    @property
    def is_whole(self) -> bool:
        """Whether all pieces have been added."""
        return not self._weights

    @property
    def result(self) -> Tensor:
        """The `(ways * width,)` embedding, or `(residues, width)` without pooling, in the pieces' dtype."""
        assert self._sum is not None
        if self._pool == "mean":
            return (self._sum[0] / self._residues).to(self._dtype)
        if self._pool == "none":
            return self._sum.to(self._dtype)
        return pool_residues(self._sum, torch.tensor([len(self._sum)]), self._sum[:1], self._pool)[0].to(
            self._dtype
        )
