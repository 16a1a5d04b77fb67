"""What half precision must not touch: angles, maps, the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.hardware import FULL, HALF


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 for a half type.

    Raises:
        TypeError: for a dtype that no backbone can have.
    """
    if dtype not in HALF + FULL:
        listed = ", ".join(str(each).removeprefix("torch.") for each in HALF + FULL)
        raise TypeError(f"expected a backbone in {listed}, got {str(dtype).removeprefix('torch.')}")
    return torch.float32 if dtype in HALF else dtype


def apply_outside_half(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Applies a module-wide conversion to a tensor that no half type may touch.

    Devices, `float32` and `float64` pass; smaller types become `float32`, so that `.half().float()`
    gives the same bits back.
    """
    applied = fn(tensor)
    if applied.is_floating_point() and applied.element_size() < torch.float32.itemsize:
        return tensor.to(applied.device, torch.float32)
    return applied


class ResidualNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input: the residual stream's, which no half type may round."""

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens, width)` to the same."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class BranchNorm(ResidualNorm):
    """The same at the beginning of a layer's branch, which goes on in the weights' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens, width)` to the same in the weights' dtype."""
        return super().forward(x).to(self.weight.dtype)
