"""Closed forms: joint moments in, stages out.

Mean and covariance of the concatenated raw embeddings are all a fit needs: the nested embedding is
an affine map of them, so its covariance, its regression on the next level and the principal
directions of the residual follow without another look at the data (Catrina et al., ICLR 2026,
arXiv 2603.07710). Everything is float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Final, Literal, TypeAlias, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from rd_torch.choices import PredictFrom, Regressor, check_choice
from rd_torch.config import Explained
from rd_torch.moments import RunningMoments
from rd_torch.significance import significant_components
from rd_torch.stage import ConcatPCA, Stage

RELATIVE_CUTOFF = 1e-12
"""Directions of the source whose variance is at most this share of the largest count as absent.

A covariance in float64 knows its eigenvalues to about `width * 2e-16` of the largest.
"""

CONSTANT_CUTOFF = 1e-13
"""So do directions whose standard deviation is at most this share of the largest mean: a constant
column, centred in float64, leaves rounding of that size."""

Filter = Callable[[Tensor], Tensor]
Added: TypeAlias = Sequence[int] | int | Literal["all"] | None


class SolveOptions(TypedDict, total=False):
    """The options of `solve_stages`, which has their meaning and their defaults."""

    added: Added
    regressor: Regressor
    alpha: float
    predict_from: PredictFrom


def solve_stages(
    moments: RunningMoments,
    widths: Mapping[str, int] | Sequence[int],
    *,
    levels: Sequence[Hashable] | None = None,
    added: Added = None,
    regressor: Regressor = "pcr",
    alpha: float = 1.0,
    predict_from: PredictFrom = "nested",
) -> list[Stage]:
    """Solves all stages of a chain from one joint covariance.

    A stage regresses the next raw embedding y on the nested embedding x, then takes the principal
    directions of the residual. Regressors, with S the centred covariances and n rows:

    - `"ols"`: `W = pinv(S_xx) S_xy`, the minimum-norm solution where S_xx has no full rank;
    - `"pcr"`: the same on the principal components of x whose variance exceeds
      `sigma^2 (1 + sqrt(p / n))^2` (Johnstone 2001), see `significant_components`;
    - `"ridge"`: `(n - 1) S_xx` and `S_xy` as centred sums, `(S_xx + alpha I) W = S_xy`.

    The intercept is free of any penalty. Signs are fixed: the entry of largest size in each direction
    is positive.

    Args:
        moments: joint moments of the raw embeddings, concatenated in the order of `widths`.
        widths: width of each raw embedding, by level name, or in order and then named 0, 1, 2, ...
        levels: the sub-chain to solve, in order; by default all.
        added: directions a stage adds: one number for each stage (or one for all of them), or
            `"all"` for every direction of its larger embedding. By default as many as make the
            nested width that of the larger embedding.
        regressor: how y is predicted.
        alpha: penalty of `"ridge"`; the others ignore it.
        predict_from: whether a stage predicts from the nested embedding (the paper's algorithm) or
            from the previous backbone's raw one.

    Returns:
        One float64 stage fewer than levels, in order; a single level needs none.

    Raises:
        ValueError: for moments of fewer than two rows or another width, levels that are not there or
            not in order, or a number of directions that cannot be.

    Examples:
        >>> moments = rd_torch.RunningMoments(5)  # of residues by the raw features of two backbones
        >>> moments.update(torch.randn(1_000, 5))
        >>> (stage,) = rd_torch.solve_stages(moments, {"small": 2, "large": 3}, regressor="ols")
    """
    columns, sizes = _chain(moments, widths, levels)
    counts = check_options(sizes, added=added, regressor=regressor, alpha=alpha, predict_from=predict_from)
    covariance, raw, means = _joint(moments, columns, sizes)
    nested, nested_mean = raw[0], means[0]
    stages = []
    for k, count in enumerate(counts, start=1):
        source, source_mean = (
            (nested, nested_mean) if predict_from == "nested" else (raw[k - 1], means[k - 1])
        )
        constant = _constant_variance(means[:k])
        W = _regression(source, raw[k], covariance, _inverse(regressor, alpha, moments.count, constant))
        miss = raw[k] - source @ W
        V, explained = _directions(miss, raw[k], covariance, count, _constant_variance(means[k : k + 1]))
        stages.append(Stage(W, means[k] - source_mean @ W, torch.zeros_like(means[k]), V, explained))
        nested = torch.cat((nested, miss @ V), dim=1)
        nested_mean = torch.cat((nested_mean, nested_mean.new_zeros(count)))
    return stages


def concat_pca(
    moments: RunningMoments,
    widths: Mapping[str, int] | Sequence[int],
    *,
    levels: Sequence[Hashable] | None = None,
) -> list[ConcatPCA]:
    """Solves the baseline of a chain, concatenation and principal components, from the same moments.

    A level's embedding is `([output of the level before, larger] - mean) components`, as wide as the
    larger embedding; the first level's is its own raw one. `RDModel` takes the stages as it takes those of
    `solve_stages`. Signs are fixed: the entry of largest size in each direction is positive.

    Args:
        moments: joint moments of the raw embeddings, concatenated in the order of `widths`.
        widths: width of each raw embedding, by level name, or in order and then named 0, 1, 2, ...
        levels: the sub-chain to solve, in order; by default all.

    Returns:
        One float64 stage fewer than levels, in order; a single level needs none.

    Raises:
        ValueError: for moments of fewer than two rows or another width, or levels that are not there or
            not in order.

    Examples:
        >>> moments = rd_torch.RunningMoments(5)
        >>> moments.update(torch.randn(1_000, 5))
        >>> (stage,) = rd_torch.concat_pca(moments, {"small": 2, "large": 3})
    """
    columns, sizes = _chain(moments, widths, levels)
    covariance, raw, means = _joint(moments, columns, sizes)
    output, mean = raw[0], means[0]
    stages = []
    for k, width in enumerate(sizes[1:], start=1):
        both, both_mean = torch.cat((output, raw[k]), dim=1), torch.cat((mean, means[k]))
        variances, components = principal_directions(both.T @ covariance @ both, width)
        total = float(variances.sum())
        there = total > _constant_variance(means[: k + 1]) * len(both_mean)
        kept = float(variances[:width].sum()) / total if there else 1.0
        stages.append(ConcatPCA(both_mean, components, Explained(r2=None, kept=kept)))
        output, mean = both @ components, mean.new_zeros(width)
    return stages


def _chain(
    moments: RunningMoments, widths: Mapping[str, int] | Sequence[int], levels: Sequence[Hashable] | None
) -> tuple[Tensor, list[int]]:
    """Columns of the joint moments that belong to the chain, level after level, and its raw widths."""
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


def _joint(
    moments: RunningMoments, columns: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """The chain's covariance; each level's raw embedding as a map of them all side by side, and its mean."""
    covariance = moments.covariance()[columns[:, None], columns]
    identity = torch.eye(len(columns), dtype=torch.float64, device=columns.device)
    return covariance, identity.split(list(sizes), dim=1), moments.mean[columns].split(list(sizes))


SOLVE_DEFAULTS: Final[SolveOptions] = {
    name: parameter.default
    for name, parameter in inspect.signature(solve_stages).parameters.items()
    if name in SolveOptions.__annotations__
}  # type: ignore[assignment]  # the names are the options'


def check_options(sizes: Sequence[int], **options: Unpack[SolveOptions]) -> list[int]:
    """Checks options of `solve_stages` before there are moments; returns how many directions each stage adds.

    Args:
        sizes: raw widths of the chain's backbones, in order.
        **options: what is not given has its default.

    Raises:
        ValueError: for options that cannot be.
    """
    chosen: SolveOptions = {**SOLVE_DEFAULTS, **options}
    added, alpha = chosen["added"], chosen["alpha"]
    check_choice("regressor", chosen["regressor"], get_args(Regressor))
    check_choice("predict_from", chosen["predict_from"], get_args(PredictFrom))
    if not alpha >= 0:
        raise ValueError(f"expected alpha of at least 0, got {alpha}")
    if not sizes:
        raise ValueError("expected at least one level, got none")
    larger = list(sizes[1:])
    if isinstance(added, str):
        check_choice("added", added, ("all",))
        return larger
    least = 0
    if added is None:
        least, added = 1, [q - p for p, q in pairwise(sizes)]
    counts = [added] * len(larger) if isinstance(added, int | Integral) else list(added)
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in counts)
    fits = len(counts) == len(larger) and whole
    if not fits or any(not least <= int(n) <= q for n, q in zip(counts, larger, strict=True)):
        raise ValueError(
            f"expected {len(larger)} whole numbers of added directions, each from {least} to the larger "
            f"width ({larger}), got {counts}: where widths do not grow, say how many with `added`"
        )
    return [int(n) for n in counts]


def _regression(source: Tensor, larger: Tensor, covariance: Tensor, weigh: Filter) -> Tensor:
    """W of the larger embedding on the source, both given as maps of the concatenated raw ones."""
    source_covariance = source.T @ covariance @ source
    eigenvalues, vectors = torch.linalg.eigh(source_covariance)
    cross = source.T @ covariance @ larger
    return vectors @ (weigh(eigenvalues)[:, None] * (vectors.T @ cross))


def _constant_variance(means: Sequence[Tensor]) -> float:
    """The variance up to which columns of these means count as constant."""
    return float(torch.cat(list(means)).abs().max() * CONSTANT_CUTOFF) ** 2


def _inverse(regressor: Regressor, alpha: float, count: int, constant: float) -> Filter:
    """What stands for `1 / eigenvalue` in the inverse of the source's covariance."""
    penalty = alpha / (count - 1) if regressor == "ridge" else 0.0

    def weigh(eigenvalues: Tensor) -> Tensor:
        """The inverse of each eigenvalue that counts, zero for the others."""
        there = eigenvalues + penalty > max(RELATIVE_CUTOFF * float(eigenvalues[-1]), constant)
        if regressor == "pcr":
            there &= significant_components(eigenvalues, count)
        inverse = torch.zeros_like(eigenvalues)
        inverse[there] = 1 / (eigenvalues[there] + penalty)
        return inverse

    return weigh


def _directions(
    miss: Tensor, larger: Tensor, covariance: Tensor, count: int, constant: float
) -> tuple[Tensor, Explained]:
    """The leading directions of the residual, and what prediction and directions explain."""
    variances, V = principal_directions(miss.T @ covariance @ miss, count)
    total = float(torch.trace(larger.T @ covariance @ larger))
    missed = float(variances.sum())
    explained = Explained(
        r2=1 - missed / total if total > constant * larger.shape[1] else 1.0,
        kept=float(variances[:count].sum()) / missed if missed > 0 else 1.0,
    )
    return V, explained


def principal_directions(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All principal variances, falling, and the `count` leading directions, signs fixed."""
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    V = vectors.flip(1)[:, :count]
    peaks = V.gather(0, V.abs().argmax(0, keepdim=True)) if count else V[:1]
    return eigenvalues.flip(0).clamp(min=0), V * torch.where(peaks < 0, -1.0, 1.0)
