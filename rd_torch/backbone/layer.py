"""`TransformerLayer`: one layer of ESM-2 over packed tokens, under fair-esm's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rd_torch import hardware
from rd_torch.backbone.attention import RotaryEmbedding, Rotation, attend, attention_maps, rotate
from rd_torch.backbone.packing import Packing, in_chunks, is_recorded
from rd_torch.backbone.precision import BranchNorm
from rd_torch.modules import is_fetched

# Multiply-adds of a float32 product below which PyTorch is done before oneDNN has set the product up, which
# takes some 40 microseconds. Measured with AVX2; above, oneDNN is at most a sixth slower, and mostly faster.
SMALL_PRODUCT = 1 << 22

Heads = tuple[Tensor, Tensor, Tensor]
AttentionSink = Callable[[Tensor], None]


class _Product(torch.autograd.Function):
    """The product `x weight' + bias` by oneDNN, with its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return `(tokens, out features)` of `(tokens, in features)`."""
        return _multiply_by_onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
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
        if func is not functional.linear or kwargs or len(args) < 3 or not _is_for_onednn(*args):
            return func(*args, **(kwargs or {}))
        return _Product.apply(*args) if is_recorded(*args) else _multiply_by_onednn(*args)


def _is_small(x: Tensor, out_features: int) -> bool:
    return x.dtype == torch.float32 and x.numel() * out_features < SMALL_PRODUCT


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        bias is not None
        and len(x) > 0
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


def _recompute(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """Return a context in which autograd saves how to compute `tensor` again, and not the tensor.

    The result of the GELU, for which this is used, would be a quarter of a layer's activations. Nothing
    happens where no graph is recorded, or where somebody else decides what is saved: a compiler,
    checkpointing, `save_on_cpu`, `torch.func`, tensors that are spread over devices.
    """
    if (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or not is_recorded(tensor)
        or not hardware.may_replace_saved_tensors()
    ):
        return nullcontext()
    place, shape = tensor.data_ptr(), tensor.shape

    def save(saved: Tensor) -> Tensor | None:
        """Return None in place of the tensor, and everything else as it is."""
        return None if (saved.data_ptr(), saved.shape) == (place, shape) else saved

    def restore(saved: Tensor | None) -> Tensor:
        """Return what was saved, or compute the tensor again."""
        if saved is not None:
            return saved
        with torch.no_grad():
            return compute()

    return torch.autograd.graph.saved_tensors_hooks(save, restore)


class SelfAttention(nn.Module):
    """The projections of multi-head self-attention.

    Args:
        width: number of features of a token.
        attention_heads: number of heads.
    """

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.rot_emb = RotaryEmbedding(width // attention_heads)

    def forward(self, x: Tensor, rotation: Rotation) -> Heads:
        """Return rotated queries, rotated keys, and values, each `(tokens, heads, size)`.

        Args:
            x: `(tokens, width)` normalised residual stream.
            rotation: cosines and signed sines of the tokens' angles.
        """
        q, k, v = (
            rearrange(project(layer, x), "t (h d) -> t h d", h=self.attention_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, rotation), rotate(k, rotation), v


class TransformerLayer(nn.Module):
    """One pre-norm layer: attention, then a feed-forward block that is four times as wide.

    Args:
        width: number of features of a token.
        attention_heads: number of heads.
    """

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, attention_heads)
        self.self_attn_layer_norm = BranchNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = BranchNorm(width)

    def forward(
        self, x: Tensor, packing: Packing, rotation: Rotation, sink: AttentionSink | None = None
    ) -> Tensor:
        """Return the `(tokens, width)` residual stream after the layer.

        Args:
            x: `(tokens, width)` residual stream before the layer.
            packing: packing of the tokens.
            rotation: cosines and signed sines of the tokens' angles.
            sink: function that is called with the layer's `(batch, heads, time, time)` attention maps.
        """
        fetched = partial(is_fetched, self)  # then each chunk would fetch the weights once more
        q, k, v = in_chunks(self.begin, x, *rotation, unless=fetched)
        if sink is not None:
            sink(attention_maps(q, k, packing))
        return in_chunks(self.finish, x, attend(q, k, v, packing), unless=fetched)[0]

    def begin(self, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        """Return queries, keys and values of each token: the part of the layer before attention."""
        return self.self_attn(self.self_attn_layer_norm(x), (cos, sin))

    def finish(self, x: Tensor, mixed: Tensor) -> tuple[Tensor]:
        """Return the stream after attention's projection and the feed-forward block, as a tuple of one."""
        x = x + project(self.self_attn.out_proj, mixed.flatten(1))
        hidden = project(self.fc1, self.final_layer_norm(x))
        inner = functional.gelu(hidden)
        with _recompute(inner, lambda: functional.gelu(hidden)):
            return (x + project(self.fc2, inner),)
