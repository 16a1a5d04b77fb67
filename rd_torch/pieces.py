"""`Pieces`: a long sequence in overlapping pieces, whose embeddings are blended residue by residue."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rd_torch.pooling import pooled, pools_of


class Pieces(NamedTuple):
    """How sequences that are longer than a model is good at are cut, and their embeddings put together.

    Pieces of `length` residues begin every `length - overlap` residues; the last one ends with the sequence
    and overlaps more. Where several cover a residue, its embedding is their mean with weights that fall
    evenly towards the ends of each piece, `w = min(i, length + 1 - i)` for its residue i from 1, for those
    near an end were computed without their neighbours. Weights sum to one, so that blending raw embeddings
    and applying the maps is applying the maps and blending; and each feature is blended alone, so that
    prefixes stay prefixes.

    Attributes:
        length: residues of a piece; sequences up to this length stay whole.
        overlap: residues that neighbouring pieces share.
    """

    length: int
    overlap: int

    @classmethod
    def of(cls, given: int | tuple[int, int], pool: str = "mean") -> Pieces:
        """From a length, of which a quarter overlaps, or a length and an overlap.

        Raises:
            ValueError: for a length below 1, an overlap that is negative or no shorter than a piece, or a
                pooling that takes `<cls>`.
        """
        if "cls" in pools_of(pool):
            raise ValueError(
                "expected windows with poolings of residues, got 'cls': every piece has a <cls> of its own"
            )
        length, overlap = given if isinstance(given, tuple) else (given, given // 4)
        if length < 1 or not 0 <= overlap < length:
            raise ValueError(
                "expected windows of at least 1 residue with an overlap from 0 to below their length, got "
                f"{length} with {overlap}"
            )
        return cls(length, overlap)

    def starts(self, residues: int) -> list[int]:
        """Where the pieces of so long a sequence begin; one for a sequence that stays whole."""
        if residues <= self.length:
            return [0]
        last = residues - self.length
        return [*range(0, last, self.length - self.overlap), last]

    def weights(self, residues: int) -> Tensor:
        """`(pieces, length)` float64 shares of each piece in its residues' embeddings, which sum to one."""
        starts, length = self.starts(residues), min(self.length, residues)
        place = torch.arange(1, length + 1, dtype=torch.float64)
        ramp = torch.minimum(place, length + 1 - place)
        sums = torch.zeros(residues, dtype=torch.float64)
        for start in starts:
            sums[start : start + length] += ramp
        return torch.stack([ramp / sums[start : start + length] for start in starts])


class Blend:
    """The embedding of one sequence while its pieces come, in any order.

    Args:
        pieces: how it was cut.
        residues: its length.
        pool: as `named_pool` has it; of `"mean"` alone the sum over residues is kept, else all of them.
    """

    def __init__(self, pieces: Pieces, residues: int, pool: str) -> None:
        starts = pieces.starts(residues)
        self._weights = dict(zip(starts, pieces.weights(residues), strict=True))
        self._residues, self._pool = residues, pool
        self._sum: Tensor | None = None
        self._dtype = torch.float32

    def add(self, start: int, rows: Tensor) -> None:
        """Adds the `(length, width)` embedding of the piece that begins at a residue."""
        weighted = rows.double() * self._weights.pop(start)[:, None]
        self._dtype = rows.dtype
        if self._sum is None:
            self._sum = torch.zeros(1 if self._pool == "mean" else self._residues, rows.shape[1]).double()
        if self._pool == "mean":  # row after row: the mean of a prefix is the prefix of the mean, to the bit
            self._sum.index_add_(0, torch.zeros(len(rows), dtype=torch.long), weighted)
        else:
            self._sum[start : start + len(rows)] += weighted

    @property
    def is_whole(self) -> bool:
        """Whether all pieces have come."""
        return not self._weights

    @property
    def result(self) -> Tensor:
        """`(ways * width,)` or `(residues, width)`, in the dtype of the pieces."""
        assert self._sum is not None
        if self._pool == "mean":
            return (self._sum[0] / self._residues).to(self._dtype)
        if self._pool == "none":
            return self._sum.to(self._dtype)
        return pooled(self._sum, torch.tensor([len(self._sum)]), self._sum[:1], self._pool)[0].to(self._dtype)
