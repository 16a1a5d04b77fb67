"""Tell principal components from noise, which is how the regressor `pcr` chooses them."""

from __future__ import annotations

import math

from torch import Tensor


def significant_components(eigenvalues: Tensor, count: int) -> Tensor:
    """Return a `(p,)` mask that is True at principal components which stand out from noise.

    A component counts when its variance exceeds `sigma^2 (1 + sqrt(p / n))^2`, the edge of the
    spectrum of pure noise (Johnstone 2001, doi:10.1214/aos/1009210544). `sigma^2` is the median of
    the eigenvalues which, divided by the mean one, lie below that edge (if none does: of the
    smallest quarter). If none counts, those that explain 95 % of the variance do.

    Args:
        eigenvalues: `(p,)` eigenvalues of a covariance, rising.
        count: number n of rows that the covariance was computed from.
    """
    p = len(eigenvalues)
    edge = (1 + math.sqrt(p / count)) ** 2
    bulk = eigenvalues[eigenvalues < edge * eigenvalues.mean()]
    if not len(bulk):
        bulk = eigenvalues[: max(1, p // 4)]
    kept = eigenvalues > bulk.quantile(0.5) * edge
    if bool(kept.any()):
        return kept
    falling = eigenvalues.flip(0).clamp(min=0)
    before = falling.cumsum(0) - falling
    return (before < 0.95 * falling.sum()).flip(0)
