"""Embeddings as affine maps of the raw embeddings of all layers side by side.

Averaging over residues and every approach are affine, so raw embeddings are computed and averaged once; an
embedding is then one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.scaling.layers import Widths
from rd_torch import RunningMoments, concat_pca, solve_stages
from rd_torch.maps import Maps
from rd_torch.modules import modules_of
from rd_torch.solve import Added, principal_directions
from rd_torch.stage import nest

PLAIN, PCA, NESTED, ALL, CONCAT = "plain", "PCA", "nested", "all directions", "concat + PCA"
CENTRED, BY_FEATURE, BY_BLOCK = "centred", "centred, by feature", "centred, by block"
"""Scales: each feature less its mean; then over its deviation, or over its block's."""


class Recipe(NamedTuple):
    """What an embedding is made of, and how.

    Attributes:
        kind: `PLAIN` or `PCA`, which take one layer, or `NESTED`, `ALL` or `CONCAT`.
        layers: Names of the layers, one of each backbone that runs, smallest backbone first.
        width: Number of features; of `NESTED` the last step adds as many directions as make it so wide.
        scale: `CENTRED`, `BY_FEATURE` or `BY_BLOCK`; empty where features are left as they are.
    """

    kind: str
    layers: tuple[str, ...]
    width: int
    scale: str = ""


class Affine(NamedTuple):
    """`rows[:, columns] matrix + offset`, in float64.

    Attributes:
        columns: `(n,)` numbers of the features that are read, among those of all layers.
        matrix: `(n, width)`.
        offset: `(width,)`.
    """

    columns: Tensor
    matrix: Tensor
    offset: Tensor

    def __call__(
        self, rows: Tensor, part: Tensor | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Return `(rows, width)` features of raw embeddings side by side.

        Args:
            rows: `(rows, widths together)`.
            part: Numbers of the rows to take, by default all.
            device: Device that computes, by default that of the rows.
        """
        chosen = rows[:, self.columns] if part is None else rows[part[:, None], self.columns]
        chosen = chosen.to(device or rows.device).to(self.matrix.dtype)
        return torch.addmm(self.offset.to(chosen.device), chosen, self.matrix.to(chosen.device))


class Solver:
    """Maps of recipes from joint moments, each solved once.

    Args:
        moments: Joint moments of the raw embeddings of all layers side by side.
        widths: Widths of these by layer.
    """

    def __init__(self, moments: RunningMoments, widths: Widths) -> None:
        self.moments = moments
        self.widths = widths
        self.covariance = moments.covariance()
        self.map_of = cache(self._map_of)
        every = torch.arange(sum(widths.values())).split(list(widths.values()))
        self._columns = dict(zip(widths, every, strict=True))

    def recipe(self, kind: str, layers: Sequence[str], scale: str = "") -> Recipe:
        """Return a recipe of its default width: that of the last layer, or with all directions the sum."""
        widths = [self.widths[layer] for layer in layers]
        return Recipe(kind, tuple(layers), sum(widths) if kind == ALL else widths[-1], scale)

    def columns(self, layers: Sequence[str]) -> Tensor:
        """Return the numbers of the features of layers."""
        return torch.cat([self._columns[layer] for layer in layers])

    def stages(self, recipe: Recipe) -> Sequence[Maps]:
        """Return the stages of a nested embedding or of a concatenation."""
        layers = recipe.layers
        if recipe.kind == CONCAT:
            return concat_pca(self.moments, self.widths, levels=layers)
        widths = [self.widths[layer] for layer in layers[:-1]]
        counts = [q - p for p, q in pairwise((*widths, recipe.width))]
        added: Added = "all" if recipe.kind == ALL else counts
        return solve_stages(self.moments, self.widths, levels=layers, added=added)

    def _map_of(self, recipe: Recipe) -> Affine:
        """Return the map of a recipe."""
        columns = self.columns(recipe.layers)
        inside = self.covariance[columns[:, None], columns]
        if recipe.kind == PLAIN:
            matrix = torch.eye(len(columns), dtype=torch.float64)
            offset = matrix.new_zeros(len(columns))
        elif recipe.kind == PCA:
            _, matrix = principal_directions(inside, recipe.width)
            offset = matrix.new_zeros(recipe.width)
        else:
            widths = {layer: self.widths[layer] for layer in recipe.layers}
            matrix, offset = affine_of(self.stages(recipe), widths)
        if recipe.scale:
            factors = self._factors(recipe, torch.einsum("iw,ij,jw->w", matrix, inside, matrix))
            matrix = matrix * factors
            offset = -self.moments.mean[columns] @ matrix
        return Affine(columns, matrix, offset)

    def _factors(self, recipe: Recipe, variances: Tensor) -> Tensor:
        """Return what the scale multiplies features of these variances by."""
        if recipe.scale == CENTRED:
            return torch.ones_like(variances)
        if recipe.scale == BY_BLOCK:
            ends = [self.recipe(recipe.kind, recipe.layers[: k + 1]).width for k in range(len(recipe.layers))]
            blocks = variances.tensor_split(ends[:-1])
            variances = torch.cat([block.mean().expand(len(block)) for block in blocks])
        return variances.rsqrt()


def affine_of(stages: Sequence[Maps], widths: Widths) -> tuple[Tensor, Tensor]:
    """Return matrix and offset of what stages do to the raw embeddings of their layers side by side.

    They are read off what stages make of nothing and of each feature alone.
    """
    total = sum(widths.values())
    probes = torch.cat((torch.zeros(1, total, dtype=torch.float64), torch.eye(total, dtype=torch.float64)))
    raw = dict(zip(widths, probes.split(list(widths.values()), dim=1), strict=True))
    _, *rest = widths
    *_, made = nest(raw, modules_of(dict(zip(rest, stages, strict=True))), "nested").values()
    return made[1:] - made[0], made[0]


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
