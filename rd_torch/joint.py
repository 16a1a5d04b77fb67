"""`Joint`: the part of joint moments that a chain takes, level by level."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rd_torch.moments import RunningMoments


class Joint(NamedTuple):
    """The moments of a chain's raw embeddings, side by side.

    Attributes:
        covariance: their joint covariance.
        raw: for each level the `(sum of widths, width)` map that picks its embedding.
        means: for each level the mean of its embedding.
    """

    covariance: Tensor
    raw: Sequence[Tensor]
    means: Sequence[Tensor]

    @property
    def sizes(self) -> list[int]:
        """Width of each level's raw embedding."""
        return [len(mean) for mean in self.means]

    @property
    def variances(self) -> list[Tensor]:
        """For each level the variances of its features."""
        return list(self.covariance.diagonal().split(self.sizes))


def join_levels(
    moments: RunningMoments, widths: Mapping[str, int] | Sequence[int], levels: Sequence[Hashable] | None
) -> Joint:
    """Take a chain's part of joint moments; the arguments and errors are those of `solve_stages`."""
    columns, sizes = _choose_columns(moments, widths, levels)
    covariance = moments.covariance(columns)
    identity = torch.eye(len(columns), dtype=torch.float64, device=columns.device)
    return Joint(covariance, identity.split(sizes, dim=1), moments.mean[columns].split(sizes))


def _choose_columns(
    moments: RunningMoments, widths: Mapping[str, int] | Sequence[int], levels: Sequence[Hashable] | None
) -> tuple[Tensor, list[int]]:
    """Return the columns of the joint moments that the chain takes, level after level, and its raw widths."""
    named: dict[Hashable, int] = dict(widths.items() if isinstance(widths, Mapping) else enumerate(widths))
    chain = list(named) if levels is None else list(levels)
    if sum(named.values()) != moments.width:
        raise ValueError(
            f"expected moments of width {sum(named.values())}, the sum of {list(named.values())}, "
            f"got {moments.width}"
        )
    names = list(named)
    if not chain or any(level not in named for level in chain):
        raise ValueError(f"expected levels among {names}, got {list(chain)}")
    places = [names.index(level) for level in chain]
    if places != sorted(set(places)):
        raise ValueError(f"expected each level once in the order {names}, got {list(chain)}")
    blocks = torch.arange(moments.width, device=moments.mean.device).split(list(named.values()))
    return torch.cat([blocks[place] for place in places]), [named[level] for level in chain]
