"""The approaches as affine maps of all raw embeddings side by side, and angles between maps.

Averaging over residues and every approach are affine, so raw embeddings are computed and averaged once; an
approach at a level is then one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from rd_torch import RunningMoments, concat_pca, solve_stages
from rd_torch.maps import Maps
from rd_torch.modules import modules_of
from rd_torch.solve import principal_directions
from rd_torch.stage import nest

PLAIN, ROTATED = "plain", "plain, rotated"
PCR, OLS, ALL, CONCAT = "nested, PCR", "nested, OLS", "nested, OLS, all added", "concat + PCA"
Widths = Mapping[str, int]

SOLVERS: Mapping[str, Callable[[RunningMoments, Widths], Sequence[Maps]]] = {
    PCR: solve_stages,
    OLS: lambda moments, widths: solve_stages(moments, widths, regressor="ols"),
    ALL: lambda moments, widths: solve_stages(moments, widths, regressor="ols", added="all"),
    CONCAT: concat_pca,
}
APPROACHES = (PLAIN, ROTATED, *SOLVERS)


class Place(NamedTuple):
    """An approach at a level."""

    approach: str
    level: str


class Affine(NamedTuple):
    """`rows matrix + offset`, in float64.

    Attributes:
        matrix: `(widths together, width)`.
        offset: `(width,)`.
    """

    matrix: Tensor
    offset: Tensor

    @property
    def width(self) -> int:
        """Return the number of features that come out."""
        return len(self.offset)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `(rows, width)` features of raw embeddings side by side."""
        matrix, offset = self.matrix.to(rows.device), self.offset.to(rows.device)
        return torch.addmm(offset, rows.to(matrix.dtype), matrix)


def places(widths: Widths) -> list[Place]:
    """Return every approach at every level, each embedding once."""
    return list(
        dict.fromkeys(place_of(approach, level, widths) for approach in APPROACHES for level in widths)
    )


def place_of(approach: str, level: str, widths: Widths) -> Place:
    """Return where an approach's embedding of a level is found.

    What is solved begins with the plain backbone.
    """
    return Place(PLAIN if approach in SOLVERS and level == next(iter(widths)) else approach, level)


def plain_maps(widths: Widths) -> dict[Place, Affine]:
    """Return the map to each backbone's own embedding."""
    identity = torch.eye(sum(widths.values()), dtype=torch.float64)
    blocks = identity.split(list(widths.values()), dim=1)
    return {
        Place(PLAIN, level): Affine(block, block.new_zeros(block.shape[1]))
        for level, block in zip(widths, blocks, strict=True)
    }


def rotated_maps(moments: RunningMoments, widths: Widths) -> dict[Place, Affine]:
    """Return the map to each backbone's own embedding in the coordinates of all its principal components.

    Nothing is added and nothing lost: what a head gains by it, it gains by coordinates alone. Added features
    and those of concatenation are components too, so this is what they are to be held against.
    """
    covariance = moments.covariance()
    maps = {}
    for (_, level), (block, offset) in plain_maps(widths).items():
        _, components = principal_directions(block.T @ covariance @ block, block.shape[1])
        maps[Place(ROTATED, level)] = Affine(block @ components, offset)
    return maps


def solved_maps(approach: str, moments: RunningMoments, widths: Widths) -> dict[Place, Affine]:
    """Return the maps of an approach at every level but the first, from joint moments."""
    return affine_maps(approach, SOLVERS[approach](moments, widths), widths)


def affine_maps(approach: str, stages: Sequence[Maps], widths: Widths) -> dict[Place, Affine]:
    """Return what stages do to raw embeddings.

    It is read off what they make of nothing and of each feature alone.
    """
    total = sum(widths.values())
    probes = torch.cat((torch.zeros(1, total, dtype=torch.float64), torch.eye(total, dtype=torch.float64)))
    raw = dict(zip(widths, probes.split(list(widths.values()), dim=1), strict=True))
    _, *rest = widths
    levels = nest(raw, modules_of(dict(zip(rest, stages, strict=True))), "nested")
    return {
        Place(approach, level): Affine(levels[level][1:] - levels[level][0], levels[level][0])
        for level in rest
    }


def all_maps(moments: RunningMoments, widths: Widths) -> dict[Place, Affine]:
    """Return the map of every place."""
    maps = plain_maps(widths) | rotated_maps(moments, widths)
    for approach in SOLVERS:
        maps |= solved_maps(approach, moments, widths)
    return {place: maps[place] for place in places(widths)}


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the principal angles in degrees, rising, between the spans of orthonormal columns."""
    return torch.linalg.svdvals(one.T @ other).clamp(max=1).acos().rad2deg()


def angles_between(spans: Sequence[Tensor]) -> Tensor:
    """Return `(pairs, directions)` principal angles of all pairs."""
    return torch.stack([principal_angles(one, other) for one, other in combinations(spans, 2)])


def angles_at_random(directions: int, width: int) -> Tensor:
    """Return such angles between random subspaces of these sizes, which know nothing of each other."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(5, width, directions, dtype=torch.float64, generator=generator)
    return angles_between(list(torch.linalg.qr(drawn).Q))


def explained_by_prefix(features: Tensor, covariance: Tensor) -> Tensor:
    """Return the share of the variance of all raw embeddings that the first 0, 1, 2, ... features explain.

    Args:
        features: `(widths together, width)`, the features as a linear map of the raw embeddings.
        covariance: Covariance of the raw embeddings.

    Returns:
        `(width + 1,)` shares that rise from 0, each by linear regression on the features.
    """
    inner = features.T @ covariance @ features
    cross = features.T @ covariance
    # Row k of the Cholesky factor's inverse makes feature k uncorrelated with those before it.
    jitter = 1e-12 * inner.diagonal().max() * torch.eye(len(inner), dtype=inner.dtype)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(inner + jitter), cross, upper=False)
    shares = white.square().sum(1) / covariance.trace()
    return torch.cat((shares.new_zeros(1), shares.cumsum(0)))
