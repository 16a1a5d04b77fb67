"""`Layer`: what layers of all packed families have alike, token-wise parts around one call of attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from rd_torch import hardware
from rd_torch.backbone.attention import Rotation, attend, attention_maps, rotate
from rd_torch.backbone.packing import Packing, in_chunks, is_recorded
from rd_torch.modules import is_fetched

Heads = tuple[Tensor, Tensor, Tensor]
AttentionSink = Callable[[Tensor], None]


class Layer(nn.Module):
    """One layer of a transformer over packed tokens: attention, and before and after it parts token by token.

    A family's own class gives the two parts, `begin` and `finish`.
    """

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
        """Return rotated queries, rotated keys and values of each token, each `(tokens, heads, size)`.

        Args:
            x: `(tokens, width)` residual stream before the layer.
            cos: `(tokens, 1, size)` cosines of the tokens' angles.
            sin: `(tokens, 1, size)` signed sines of the angles.
        """
        raise NotImplementedError

    def finish(self, x: Tensor, mixed: Tensor) -> tuple[Tensor]:
        """Return the `(tokens, width)` residual stream after the layer, as a tuple of one.

        Args:
            x: `(tokens, width)` residual stream before the layer.
            mixed: `(tokens, heads, size)` what attention gives.
        """
        raise NotImplementedError


def rotated_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, rotation: Rotation) -> Heads:
    """Return queries and keys, both rotated, and values, each as `(tokens, heads, size)`.

    Args:
        q: `(tokens, width)` queries.
        k: `(tokens, width)` keys.
        v: `(tokens, width)` values.
        heads: number of heads.
        rotation: cosines and signed sines of the tokens' angles.
    """
    q, k, v = (rearrange(each, "t (h d) -> t h d", h=heads) for each in (q, k, v))
    return rotate(q, rotation), rotate(k, rotation), v


def recompute(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """Return a context in which autograd saves how to compute `tensor` again, and not the tensor.

    The result of a GELU, for example, would be a quarter of a layer's activations. Nothing
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
