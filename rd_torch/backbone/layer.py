"""One transformer layer of ESM-2 over packed tokens, under fair-esm's parameter names."""

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

# Multiply-adds of a product below which oneDNN takes longer to set it up, some 40 microseconds, than PyTorch
# to compute it in float32. Measured with AVX2; above, oneDNN is at most a sixth slower, and mostly faster.
SMALL_PRODUCT = 1 << 22

Heads = tuple[Tensor, Tensor, Tensor]
AttentionSink = Callable[[Tensor], None]


class _Product(torch.autograd.Function):
    """`x weight' + bias` by oneDNN, with its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`(tokens, in features)` to `(tokens, out features)`."""
        return _by_onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keeps what gradients that are wanted need."""
        x, weight, _ = inputs
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x`, the weight and the bias; differentiable where that is asked for."""
        x, weight = ctx.saved_tensors
        multiply = _differentiable if torch.is_grad_enabled() else _by_onednn
        gradient = gradient.contiguous()
        return (
            None if weight is None else multiply(gradient, weight.t().contiguous()),
            None if x is None else multiply(gradient.t().contiguous(), x.t().contiguous()),
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _differentiable(x: Tensor, weight: Tensor) -> Tensor:
    """The same where gradients of gradients are wanted."""
    return functional.linear(x, weight)


class _ByOneDNN(TorchFunctionMode):
    """Within it linear layers multiply by oneDNN where PyTorch would take MKL."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What the function gives; a linear layer's product, where oneDNN is the faster one, by that."""
        if func is not functional.linear or kwargs or len(args) < 3 or not _is_for_onednn(*args):
            return func(*args, **(kwargs or {}))
        return _Product.apply(*args) if is_recorded(*args) else _by_onednn(*args)


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
    """What a linear layer gives, on a CPU by oneDNN where PyTorch would take MKL.

    In float32 that is twice as fast on AMD's CPUs with AVX512, whose vector units MKL uses by half; with AVX2
    it is up to twice as fast for few tokens and about as fast for many. Small products in float32 are
    PyTorch's; so is everything where a graph is traced. The layer is called as it is, a plain `nn.Linear` or
    whatever quantised, adapted or hooked one somebody has put in its place.

    Args:
        layer: the layer.
        x: `(tokens, in features)`.

    Returns:
        `(tokens, out features)`.
    """
    out_features = getattr(layer, "out_features", SMALL_PRODUCT)
    if (
        torch.compiler.is_compiling()
        or _is_small(x, out_features)  # asked before the mode too, which would add much to it
        or hardware.product_kernel(x.device, x.dtype) != "oneDNN"
        or torch.is_autocast_enabled("cpu")
    ):
        return layer(x)
    with _ByOneDNN():
        return layer(x)


def _computed_again(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """Within it autograd keeps of `tensor` only how to compute it again: a quarter of a layer's activations.

    Nothing happens where no graph is recorded, or where somebody else says what is kept: a compiler,
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

    def keep(kept: Tensor) -> Tensor | None:
        """Nothing in place of the tensor, everything else as it is."""
        return None if (kept.data_ptr(), kept.shape) == (place, shape) else kept

    def give_back(kept: Tensor | None) -> Tensor:
        """What was kept, or the tensor computed again."""
        if kept is not None:
            return kept
        with torch.no_grad():
            return compute()

    return torch.autograd.graph.saved_tensors_hooks(keep, give_back)


class SelfAttention(nn.Module):
    """The projections of multi-head self-attention."""

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.rot_emb = RotaryEmbedding(width // attention_heads)

    def forward(self, x: Tensor, rotation: Rotation) -> Heads:
        """Rotated queries, rotated keys and values, each `(tokens, heads, size)`, of `(tokens, width)`."""
        q, k, v = (
            rearrange(project(layer, x), "t (h d) -> t h d", h=self.attention_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, rotation), rotate(k, rotation), v


class TransformerLayer(nn.Module):
    """One pre-norm layer: attention, then a feed-forward block four times as wide."""

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
        """The residual stream `(tokens, width)` one layer on; `sink` receives attention maps if given."""
        fetched = partial(is_fetched, self)  # a chunk more would fetch the weights once more
        q, k, v = in_chunks(self.heads, x, *rotation, unless=fetched)
        if sink is not None:
            sink(attention_maps(q, k, packing))
        return in_chunks(self.finish, x, attend(q, k, v, packing), unless=fetched)[0]

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        """What attention needs of each token: the part of the layer before it."""
        return self.self_attn(self.self_attn_layer_norm(x), (cos, sin))

    def finish(self, x: Tensor, mixed: Tensor) -> tuple[Tensor]:
        """The part of the layer behind attention: its projection and the feed-forward block."""
        x = x + project(self.self_attn.out_proj, mixed.flatten(1))
        hidden = project(self.fc1, self.final_layer_norm(x))
        inner = functional.gelu(hidden)
        with _computed_again(inner, lambda: functional.gelu(hidden)):
            return (x + project(self.fc2, inner),)
