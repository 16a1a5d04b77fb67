"""What half precision must not touch: angles, maps, the residual stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

HALF: Final = (torch.float16, torch.bfloat16)
FULL: Final = (torch.float32, torch.float64)

AMPERE: Final = (8, 0)
"""Compute capability from which GPUs multiply in bfloat16."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 for a half type.

    Raises:
        TypeError: for a dtype that no backbone can have.
    """
    if dtype not in HALF + FULL:
        listed = ", ".join(str(each).removeprefix("torch.") for each in HALF + FULL)
        raise TypeError(f"expected a backbone in {listed}, got {str(dtype).removeprefix('torch.')}")
    return torch.float32 if dtype in HALF else dtype


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes the dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype in HALF:
        half = torch.ops.mkldnn
        supported = (
            half._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else half._is_mkldnn_fp16_supported
        )
        return bool(supported())
    return dtype == torch.float32


def warn_if_emulated(device: torch.device, dtype: torch.dtype) -> None:
    """Warns where the device has a half type only in emulation, slower than float32."""
    if device.type == "cpu":
        emulated = dtype in HALF and not onednn_has(dtype)
    else:
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE
        emulated = old and dtype == torch.bfloat16
    if emulated:
        warnings.warn(
            f"{device} computes {str(dtype).removeprefix('torch.')} in emulation, slower than float32: "
            "results are right, but another dtype is faster",
            stacklevel=3,
        )


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
