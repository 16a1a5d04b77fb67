"""Principal angles between subspaces: how much the added directions of several fits are the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor


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
