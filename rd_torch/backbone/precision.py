"""Keep half precision away from what it would spoil: angles, maps and the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.hardware import FULL, HALF


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype itself, or float32 for a half type.

    Raises:
        TypeError: for a dtype that no backbone can have.
    """
    if dtype not in HALF + FULL:
        listed = ", ".join(str(each).removeprefix("torch.") for each in HALF + FULL)
        raise TypeError(f"expected a backbone in {listed}, got {str(dtype).removeprefix('torch.')}")
    return torch.float32 if dtype in HALF else dtype


def apply_outside_half(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a conversion of a whole module, such as `.half()`, to a tensor that no half type may touch.

    Args:
        fn: conversion, as `nn.Module._apply` passes it.
        tensor: tensor to convert.

    Returns:
        The tensor where and what the conversion makes it, but in float32 where the conversion would make it
        smaller, so that `.half().float()` gives the same bits back.
    """
    applied = fn(tensor)
    if applied.is_floating_point() and applied.element_size() < torch.float32.itemsize:
        return tensor.to(applied.device, torch.float32)  # from `tensor`, for `applied` is rounded already
    return applied


class ResidualNorm(nn.LayerNorm):
    """A LayerNorm in the dtype of its input, which in the residual stream must not be rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(tokens, width)` normalised, in the dtype of `x`."""
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class BranchNorm(ResidualNorm):
    """The same LayerNorm at the beginning of a layer's branch, which goes on in the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(tokens, width)` normalised, in the dtype of the weights."""
        return super().forward(x).to(self.weight.dtype)


@contextmanager
def sparing(model: Any, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Spare a model of transformers' angles, and what transformers keeps in float32, from a conversion.

    Args:
        model: the model.
        fn: the conversion, as `nn.Module._apply` passes it.
    """
    buffers = [
        (part._buffers, name, tensor)
        for part in model.modules()
        for name, tensor in part._buffers.items()
        if tensor is not None and (tensor.dtype in FULL or tensor.is_complex())
    ]
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = [
        (part, part.data) for name, part in model.named_parameters() if not names.isdisjoint(name.split("."))
    ]
    yield
    for holder, name, tensor in buffers:
        if tensor.is_complex():
            holder[name] = tensor.to(fn(tensor.real).device)
        else:
            holder[name] = apply_outside_half(fn, tensor)
    for parameter, data in kept:
        if parameter.dtype == torch.float16:
            parameter.data = apply_outside_half(fn, data)
