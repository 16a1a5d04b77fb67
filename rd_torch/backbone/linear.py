"""The product of a linear layer: on a CPU by oneDNN where PyTorch would take MKL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rd_torch import hardware
from rd_torch.backbone.packing import is_recorded

# Multiply-adds of a float32 product below which PyTorch is done before oneDNN has set the product up, which
# takes some 40 microseconds. Measured with AVX2; above, oneDNN is at most a sixth slower, and mostly faster.
SMALL_PRODUCT = 1 << 22


class _Product(torch.autograd.Function):
    """The product `x weight' + bias` by oneDNN, with its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `(tokens, out features)` of `(tokens, in features)`."""
        return _multiply_by_onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save no more than the wanted gradients need."""
        x, weight, _ = inputs
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of `x`, the weight and the bias, which are differentiable where that is wanted."""
        x, weight = ctx.saved_tensors
        multiply = _multiply_differentiably if torch.is_grad_enabled() else _multiply_by_onednn
        gradient = gradient.contiguous()
        return (
            None if weight is None else multiply(gradient, weight.t().contiguous()),
            None if x is None else multiply(gradient.t().contiguous(), x.t().contiguous()),
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _multiply_differentiably(x: Tensor, weight: Tensor) -> Tensor:
    """Return the same product, for gradients of gradients; oneDNN's operator has none."""
    return functional.linear(x, weight)


class _UseOneDNN(TorchFunctionMode):
    """A mode in which linear layers multiply by oneDNN where PyTorch would take MKL."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return what the function gives, or a linear layer's product by oneDNN, where that is faster."""
        if func is not functional.linear or kwargs or len(args) != 3 or not _is_for_onednn(*args):
            return func(*args, **(kwargs or {}))
        return _Product.apply(*args) if is_recorded(*args) else _multiply_by_onednn(*args)


def _is_small(x: Tensor, out_features: int) -> bool:
    return x.dtype == torch.float32 and x.numel() * out_features < SMALL_PRODUCT


def _is_for_onednn(x: Tensor, weight: Tensor, _: Tensor | None) -> bool:
    return (
        len(x) > 0
        and x.dtype == weight.dtype
        and not _is_small(x, len(weight))
        and type(weight) in (Tensor, nn.Parameter)
        and x.is_contiguous()  # strides that oneDNN has no kernel for are a thousand times slower
        and weight.is_contiguous()
    )


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, on a CPU with oneDNN's product where PyTorch would take MKL's.

    In float32 oneDNN is twice as fast on AMD's CPUs with AVX512, whose vector units MKL uses by half; with
    AVX2 it is up to twice as fast for few tokens and about as fast for many. PyTorch computes small products
    in float32, and everything where a graph is traced. The layer is called as it is, a plain `nn.Linear` or
    whatever quantised, adapted or hooked one somebody has put in its place.

    Args:
        layer: the linear layer.
        x: `(tokens, in features)`.

    Returns:
        `(tokens, out features)`.
    """
    out_features = getattr(layer, "out_features", SMALL_PRODUCT)
    if (
        torch.compiler.is_compiling()
        or _is_small(x, out_features)  # here too, because the mode would take longer than a small product
        or hardware.product_kernel(x.device, x.dtype) != "oneDNN"
        or torch.is_autocast_enabled("cpu")
    ):
        return layer(x)
    with _UseOneDNN():
        return layer(x)
