"""What half precision must not touch: angles, maps, the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

HALF: Final = (torch.float16, torch.bfloat16)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 for a half type."""
    return torch.promote_types(dtype, torch.float32)


def apply_outside_half(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Applies a module-wide conversion to a tensor that no half type may touch.

    Devices, `float32` and `float64` pass; `float16` and `bfloat16` become `float32`, so that
    `.half().float()` gives the same bits back.
    """
    applied = fn(tensor)
    if applied.dtype in HALF:
        return tensor.to(applied.device, torch.float32)
    return applied


class ResidualNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input: the residual stream's, which no half type may round."""

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens, width)` to the same."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
