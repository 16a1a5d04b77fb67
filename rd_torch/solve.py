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

from rd_torch.choices import PredictFrom, Regressor, Scale, check_choice, check_names
from rd_torch.config import Explained
from rd_torch.joint import join_levels
from rd_torch.moments import RunningMoments
from rd_torch.significance import significant_components
from rd_torch.stage import ConcatPCA, Stage

RELATIVE_CUTOFF = 1e-12
"""Directions of the source whose variance is at most this share of the largest count as absent.

A covariance in float64 knows its eigenvalues to about `width * 2e-16` of the largest.
"""

CONSTANT_CUTOFF = 1e-13
"""Directions whose standard deviation is at most this share of the largest mean count as absent too: a
constant column, centred in float64, leaves rounding of that size."""

Filter = Callable[[Tensor], Tensor]
Added: TypeAlias = Sequence[int] | int | Literal["all"] | None


class BasisOptions(TypedDict, total=False):
    """The options of `change_basis`, where their meanings stand."""

    scale: Scale
    centre: bool
    rotate_first: bool


class SolveOptions(BasisOptions, total=False):
    """The options of `solve_stages`, where their meanings and defaults stand, and of `change_basis`."""

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
    """Solve all stages of a chain from one joint covariance.

    A stage regresses the next raw embedding y on the nested embedding x, then takes the principal
    directions of the residual. Regressors, with S the centred covariances and n rows:

    - `"ols"`: `W = pinv(S_xx) S_xy`, the minimum-norm solution where S_xx has no full rank;
    - `"pcr"`: the same on the principal components of x whose variance exceeds
      `sigma^2 (1 + sqrt(p / n))^2` (Johnstone 2001), see `significant_components`;
    - `"ridge"`: `(n - 1) S_xx` and `S_xy` as centred sums, `(S_xx + alpha I) W = S_xy`.

    The intercept has no penalty. The sign of a direction is fixed: its entry of largest size is positive.

    Args:
        moments: joint moments of the raw embeddings, concatenated in the order of `widths`.
        widths: width of each raw embedding by level name; or the widths in order, and then the levels
            are named 0, 1, 2, ...
        levels: names of the levels of the sub-chain to solve, in order; by default all.
        added: number of directions that each stage adds: one number for each stage (or one for all of
            them), or `"all"` for every direction of the larger embedding. By default as many as make
            the nested embedding as wide as the larger one.
        regressor: regression that predicts y, see above.
        alpha: penalty of `"ridge"`, at least 0; the other regressors ignore it.
        predict_from: whether a stage predicts from the nested embedding (the paper's algorithm) or
            from the previous backbone's raw one.

    Returns:
        Float64 stages in order, one fewer than levels.

    Raises:
        ValueError: for moments of fewer than two rows or another width, unknown or unordered levels, or an
            option that cannot be.

    Examples:
        >>> moments = rd_torch.RunningMoments(5)  # of residues by the raw features of two backbones
        >>> moments.update(torch.randn(1_000, 5))
        >>> (stage,) = rd_torch.solve_stages(moments, {"small": 2, "large": 3}, regressor="ols")
    """
    covariance, raw, means = joint = join_levels(moments, widths, levels)
    counts = check_options(
        joint.sizes, added=added, regressor=regressor, alpha=alpha, predict_from=predict_from
    )
    nested, nested_mean = raw[0], means[0]
    stages = []
    for k, count in enumerate(counts, start=1):
        source, source_mean = (
            (nested, nested_mean) if predict_from == "nested" else (raw[k - 1], means[k - 1])
        )
        constant = _constant_variance(means[:k])
        W = _regress(source, raw[k], covariance, _make_inverse(regressor, alpha, moments.count, constant))
        residual = raw[k] - source @ W
        constant = _constant_variance(means[k : k + 1])
        V, explained = _find_directions(residual, raw[k], covariance, count, constant)
        stages.append(Stage(W, means[k] - source_mean @ W, torch.zeros_like(means[k]), V, explained))
        nested = torch.cat((nested, residual @ V), dim=1)
        nested_mean = torch.cat((nested_mean, nested_mean.new_zeros(count)))
    return stages


def concat_pca(
    moments: RunningMoments,
    widths: Mapping[str, int] | Sequence[int],
    *,
    levels: Sequence[Hashable] | None = None,
) -> list[ConcatPCA]:
    """Solve the baseline of a chain, concatenation and principal components, from the same moments.

    A level's embedding is `([output of the level before, larger] - mean) components`, as wide as the
    larger embedding; that of the first level is its raw embedding. `RDModel` takes these stages as it takes
    those of `solve_stages`. The sign of a direction is fixed: its entry of largest size is positive.

    Args:
        moments: joint moments of the raw embeddings, concatenated in the order of `widths`.
        widths: widths of the raw embeddings, as in `solve_stages`.
        levels: names of the levels of the sub-chain to solve, in order; by default all.

    Returns:
        Float64 stages in order, one fewer than levels.

    Raises:
        ValueError: for moments of fewer than two rows or another width, or unknown or unordered levels.

    Examples:
        >>> moments = rd_torch.RunningMoments(5)
        >>> moments.update(torch.randn(1_000, 5))
        >>> (stage,) = rd_torch.concat_pca(moments, {"small": 2, "large": 3})
    """
    covariance, raw, means = joint = join_levels(moments, widths, levels)
    output, mean = raw[0], means[0]
    stages = []
    for k, width in enumerate(joint.sizes[1:], start=1):
        both, both_mean = torch.cat((output, raw[k]), dim=1), torch.cat((mean, means[k]))
        variances, components = principal_directions(both.T @ covariance @ both, width)
        total = float(variances.sum())
        varies = total > _constant_variance(means[: k + 1]) * len(both_mean)
        kept = float(variances[:width].sum()) / total if varies else 1.0
        stages.append(ConcatPCA(both_mean, components, Explained(r2=None, kept=kept)))
        output, mean = both @ components, mean.new_zeros(width)
    return stages


BASIS_DEFAULTS: Final[BasisOptions] = {"scale": "none", "centre": False, "rotate_first": False}

SOLVE_DEFAULTS: Final[SolveOptions] = {
    name: parameter.default
    for name, parameter in inspect.signature(solve_stages).parameters.items()
    if name in SolveOptions.__annotations__
} | BASIS_DEFAULTS  # type: ignore[assignment]  # the names are the options'


def split_options(options: SolveOptions) -> tuple[SolveOptions, BasisOptions]:
    """Return the options of `solve_stages`, and those of `change_basis`."""
    basis = {name: value for name, value in options.items() if name in BASIS_DEFAULTS}
    rest = {name: value for name, value in options.items() if name not in BASIS_DEFAULTS}
    return rest, basis  # type: ignore[return-value]  # the names are the options'


def check_basis(**options: Unpack[BasisOptions]) -> BasisOptions:
    """Return the options of `change_basis`, with the defaults of those that are left out.

    Args:
        **options: the options that are given.

    Raises:
        ValueError: for an option that cannot be.
    """
    check_names(options, BASIS_DEFAULTS)
    chosen: BasisOptions = {**BASIS_DEFAULTS, **options}
    check_choice("scale", chosen["scale"], get_args(Scale))
    for name in ("centre", "rotate_first"):
        if not isinstance(chosen[name], bool):
            raise ValueError(f"expected {name} to be True or False, got {chosen[name]!r}")
    return chosen


def check_options(sizes: Sequence[int], **options: Unpack[SolveOptions]) -> list[int]:
    """Return how many directions each stage adds, after a check of the options that needs no moments.

    Args:
        sizes: raw widths of the chain's backbones, in order.
        **options: options of `solve_stages`; those left out have their defaults.

    Raises:
        ValueError: for options that cannot be.
    """
    check_names(options, SOLVE_DEFAULTS)
    chosen: SolveOptions = {**SOLVE_DEFAULTS, **options}
    added, alpha = chosen["added"], chosen["alpha"]
    check_choice("regressor", chosen["regressor"], get_args(Regressor))
    check_choice("predict_from", chosen["predict_from"], get_args(PredictFrom))
    check_basis(**{name: chosen[name] for name in BASIS_DEFAULTS})  # type: ignore[literal-required]
    if not alpha >= 0:
        raise ValueError(f"expected alpha of at least 0, got {alpha}")
    if not sizes:
        raise ValueError("expected at least one level, got none")
    larger = list(sizes[1:])
    if isinstance(added, str):
        check_choice("added", added, ("all",))
        return larger
    least = 0
    if added is None:  # least 1: where widths do not grow, there is no default
        least, added = 1, [q - p for p, q in pairwise(sizes)]
    counts = [added] * len(larger) if isinstance(added, int | Integral) else list(added)
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in counts)
    fits = len(counts) == len(larger) and whole
    if not fits or any(not least <= int(n) <= q for n, q in zip(counts, larger, strict=True)):
        raise ValueError(
            f"expected {len(larger)} whole numbers of added directions, each from {least} to the larger "
            f"width ({larger}), got {counts}: where widths do not grow, say how many with `added` (--added)"
        )
    return [int(n) for n in counts]


def _regress(source: Tensor, larger: Tensor, covariance: Tensor, weigh: Filter) -> Tensor:
    """Return W of the larger embedding on the source, both given as maps from the concatenated raw ones."""
    source_covariance = source.T @ covariance @ source
    eigenvalues, vectors = torch.linalg.eigh(source_covariance)
    cross = source.T @ covariance @ larger
    return vectors @ (weigh(eigenvalues)[:, None] * (vectors.T @ cross))


def _constant_variance(means: Sequence[Tensor]) -> float:
    """Return the variance up to which columns with these means count as constant."""
    return float(torch.cat(list(means)).abs().max() * CONSTANT_CUTOFF) ** 2


def _make_inverse(regressor: Regressor, alpha: float, count: int, constant: float) -> Filter:
    """Return what stands for `1 / eigenvalue` in the inverse of the source's covariance."""
    penalty = alpha / (count - 1) if regressor == "ridge" else 0.0

    def weigh(eigenvalues: Tensor) -> Tensor:
        """Return the inverse of each eigenvalue that counts, and zero for the others."""
        counting = eigenvalues + penalty > max(RELATIVE_CUTOFF * float(eigenvalues[-1]), constant)
        if regressor == "pcr":
            counting &= significant_components(eigenvalues, count)
        inverse = torch.zeros_like(eigenvalues)
        inverse[counting] = 1 / (eigenvalues[counting] + penalty)
        return inverse

    return weigh


def _find_directions(
    residual: Tensor, larger: Tensor, covariance: Tensor, count: int, constant: float
) -> tuple[Tensor, Explained]:
    """Return the leading directions of the residual, and what prediction and directions explain."""
    variances, V = principal_directions(residual.T @ covariance @ residual, count)
    total = float(torch.trace(larger.T @ covariance @ larger))
    missed = float(variances.sum())
    explained = Explained(
        r2=1 - missed / total if total > constant * larger.shape[1] else 1.0,
        kept=float(variances[:count].sum()) / missed if missed > 0 else 1.0,
    )
    return V, explained


def principal_directions(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return all principal variances, falling, and the `count` leading directions, with their signs fixed."""
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    V = vectors.flip(1)[:, :count]
    peaks = V.gather(0, V.abs().argmax(0, keepdim=True)) if count else V[:1]
    return eigenvalues.flip(0).clamp(min=0), V * torch.where(peaks < 0, -1.0, 1.0)
