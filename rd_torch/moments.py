"""Compute the mean and covariance of rows that stream by; nothing here knows of proteins or models.

Each batch is centred at its own mean before it is multiplied, and merged by the update of Chan, Golub
and LeVeque (1979), so that a mean far from zero costs no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rd_torch import hardware


class RunningMoments:
    """The count, mean and centred products, in float64, of rows that stream by.

    They take `width * width * 8` bytes of memory, however many rows come.

    Args:
        width: number of features in a row.
        device: device that holds the sums; a device without float64 is replaced by the CPU.

    Attributes:
        count: number of rows so far.

    Raises:
        ValueError: for a width below 1.

    Examples:
        >>> moments = rd_torch.RunningMoments(width=2)
        >>> moments.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> moments.update(torch.tensor([[4.0, 2.0]]))
        >>> moments.count, moments.mean.tolist()
        (3, [2.0, 2.0])
        >>> moments.covariance().tolist()
        [[4.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise ValueError(f"expected a width of at least 1, got {width}")
        device = hardware.float64_device(torch.device(device))
        self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

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
        """The number of rows so far, their `(width,)` mean and their `(width, width)` centred products."""
        return self.count, self._mean, self._scatter

    @classmethod
    def of(cls, count: int, mean: Tensor, scatter: Tensor) -> RunningMoments:
        """Make moments from the `parts` of others.

        Args:
            count: number of rows.
            mean: `(width,)` mean of the rows, in float64.
            scatter: `(width, width)` centred products of the rows, in float64.

        Returns:
            Moments that share these tensors.
        """
        moments = cls(len(mean), mean.device)
        moments.count, moments._mean, moments._scatter = count, mean, scatter
        return moments

    def covariance(self) -> Tensor:
        """Compute the unbiased covariance of all rows so far.

        Returns:
            `(width, width)` in float64.

        Raises:
            ValueError: for fewer than two rows, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"expected at least 2 rows for a covariance, got {self.count}")
        return self._scatter / (self.count - 1)

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
        self._scatter.addmm_(centred.T, centred)
        self._shift_to(mean, len(rows))

    def merge(self, other: RunningMoments) -> None:
        """Add all rows of other moments, as if they had streamed by here.

        Args:
            other: moments of the same width, on any device.

        Raises:
            ValueError: for another width.
        """
        if other.width != self.width:
            raise ValueError(f"expected moments of width {self.width}, got {other.width}")
        if other.count:
            self._scatter += other._scatter.to(self._scatter.device)
            self._shift_to(other._mean.to(self._mean.device), other.count)

    def _shift_to(self, mean: Tensor, count: int) -> None:
        """Account for the distance between the mean so far and the mean of `count` new rows."""
        total = self.count + count
        offset = mean - self._mean
        self._scatter.addr_(offset, offset, alpha=self.count * count / total)
        self._mean += offset * (count / total)
        self.count = total
