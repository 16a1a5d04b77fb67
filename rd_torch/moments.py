"""Compute the mean and covariance of rows that stream by; nothing here knows of proteins or models.

Each batch is centred at its own mean before it is multiplied, and merged by the update of Chan, Golub
and LeVeque (1979), so that a mean far from zero costs no digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rd_torch import hardware

Alternatives = Sequence[Sequence[int]]


class RunningMoments:
    """The count, mean and centred products, in float64, of rows that stream by.

    They take `width * width * 8` bytes of memory, however many rows come. Where some columns are alternatives
    to each other, such as hidden states of several layers of which one will be chosen, products between them
    are left out.

    Args:
        width: number of features in a row.
        device: device that holds the sums; a device without float64 is replaced by the CPU.
        alternatives: widths of all parts of a row, in groups of which one part each will be chosen; by
            default all products are summed.

    Attributes:
        count: number of rows so far.
        alternatives: the same as the argument.

    Raises:
        ValueError: for a width below 1, or alternatives that do not sum to the width.

    Examples:
        >>> moments = rd_torch.RunningMoments(width=2)
        >>> moments.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> moments.update(torch.tensor([[4.0, 2.0]]))
        >>> moments.count, moments.mean.tolist()
        (3, [2.0, 2.0])
        >>> moments.covariance().tolist()
        [[4.0, 2.0], [2.0, 4.0]]
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", *, alternatives: Alternatives | None = None
    ) -> None:
        if width < 1:
            raise ValueError(f"expected a width of at least 1, got {width}")
        if alternatives and sum(map(sum, alternatives)) != width:
            raise ValueError(f"expected alternatives of {width} features in all, got {alternatives}")
        device = hardware.float64_device(torch.device(device))
        self.count = 0
        self.alternatives = alternatives
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        size = count_products(alternatives or [[width]])
        self._scatter = torch.zeros(size, dtype=torch.float64, device=device)
        if not alternatives:
            self._scatter = self._scatter.view(width, width)

    @property
    def width(self) -> int:
        """Number of features in a row."""
        return self._mean.shape[0]

    @property
    def mean(self) -> Tensor:
        """The `(width,)` mean of all rows so far; zeros before the first."""
        return self._mean.clone()  # a copy, because `update` changes the sum in place

    @property
    def parts(self) -> tuple[int, Tensor, Tensor]:
        """The number of rows so far, their `(width,)` mean and their `(width, width)` centred products.

        With alternatives the products are a flat row of all blocks.
        """
        return self.count, self._mean, self._scatter

    @classmethod
    def of(
        cls, count: int, mean: Tensor, scatter: Tensor, *, alternatives: Alternatives | None = None
    ) -> RunningMoments:
        """Make moments from the `parts` of others.

        Args:
            count: number of rows.
            mean: `(width,)` mean of the rows, in float64.
            scatter: centred products of the rows, in float64, as `parts` has them.
            alternatives: those of the other moments.

        Returns:
            Moments that share these tensors.
        """
        moments = cls(1, mean.device)  # without memory for products, which these tensors bring
        moments.count, moments._mean, moments._scatter = count, mean, scatter
        moments.alternatives = alternatives
        return moments

    def covariance(self, columns: Tensor | None = None) -> Tensor:
        """Compute the unbiased covariance of all rows so far.

        Args:
            columns: `(k,)` numbers of the columns to take; by default all.

        Returns:
            `(width, width)`, or `(k, k)`, in float64.

        Raises:
            ValueError: for fewer than two rows, which have no covariance, and for columns of alternatives to
                each other.
        """
        if self.count < 2:
            raise ValueError(f"expected at least 2 rows for a covariance, got {self.count}")
        if not self.alternatives:
            products = self._scatter if columns is None else self._scatter[columns[:, None], columns]
            return products / (self.count - 1)
        if columns is None:
            columns = torch.arange(self.width, device=self._mean.device)
        result = torch.full(
            (len(columns), len(columns)), torch.nan, dtype=torch.float64, device=columns.device
        )
        for down, across, block in self._blocks():
            rows, cells = (_within(columns, place) for place in (down, across))
            part = block[(columns[rows] - down.start)[:, None], columns[cells] - across.start]
            result[rows[:, None], cells] = part
            result[cells[:, None], rows] = part.T
        if bool(result.isnan().any()):
            raise ValueError("expected columns of one alternative of each group, got several of a group")
        return result / (self.count - 1)

    def update(self, batch: Tensor) -> None:
        """Add a batch of rows; a batch without rows changes nothing.

        Args:
            batch: `(rows, width)`, of any dtype and on any device.

        Raises:
            ValueError: for another shape, or values that are not finite.
        """
        if batch.ndim != 2 or batch.shape[1] != self.width:
            raise ValueError(f"expected (rows, {self.width}), got {tuple(batch.shape)}")
        if not len(batch):
            return
        rows = batch.detach().to(self._mean.device, torch.float64)
        mean = rows.mean(0)
        if not bool(mean.isfinite().all()):
            raise ValueError("expected finite rows, got NaN or infinity")
        centred = rows - mean
        for down, across, block in self._blocks():
            block.addmm_(centred[:, down].T, centred[:, across])
        self._shift_to(mean, len(rows))

    def merge(self, other: RunningMoments) -> None:
        """Add all rows of other moments, as if they had streamed by here.

        Args:
            other: moments of the same width and alternatives, on any device.

        Raises:
            ValueError: for another width or other alternatives.
        """
        if other.width != self.width or other._scatter.shape != self._scatter.shape:
            raise ValueError(
                f"expected moments of width {self.width}, got {other.width}, or other alternatives"
            )
        if other.count:
            self._scatter += other._scatter.to(self._scatter.device)
            self._shift_to(other._mean.to(self._mean.device), other.count)

    def _shift_to(self, mean: Tensor, count: int) -> None:
        """Account for the distance between the mean so far and the mean of `count` new rows."""
        total = self.count + count
        offset = mean - self._mean
        for down, across, block in self._blocks():
            block.addr_(offset[down], offset[across], alpha=self.count * count / total)
        self._mean += offset * (count / total)
        self.count = total

    def _blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the blocks of products, with the columns that go down and across in each."""
        flat, start = self._scatter.view(-1), 0
        for down, across in _layout(self.alternatives or [[self.width]]):
            height, width = down.stop - down.start, across.stop - across.start
            yield down, across, flat[start : start + height * width].view(height, width)
            start += height * width


def count_products(alternatives: Alternatives) -> int:
    """Return how many products are summed, each of which takes 8 bytes.

    Args:
        alternatives: widths of all parts of a row, in groups of alternatives to each other.
    """
    sizes = [
        (down.stop - down.start) * (across.stop - across.start) for down, across in _layout(alternatives)
    ]
    return sum(sizes)


def _layout(alternatives: Alternatives) -> Iterator[tuple[slice, slice]]:
    """Yield columns whose products are summed: of each part with itself, and of each group with the next."""
    ends = list(accumulate(map(sum, alternatives), initial=0))
    groups = [slice(*pair) for pair in pairwise(ends)]
    for number, (group, widths) in enumerate(zip(groups, alternatives, strict=True)):
        for part in pairwise(accumulate(widths, initial=group.start)):
            yield slice(*part), slice(*part)
        for other in groups[number + 1 :]:
            yield group, other


def _within(columns: Tensor, place: slice) -> Tensor:
    """Return the positions of those columns that are within a slice."""
    return torch.nonzero((columns >= place.start) & (columns < place.stop)).flatten()
