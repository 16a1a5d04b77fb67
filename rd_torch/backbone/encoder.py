"""`Encoder`: a backbone that is a stack of layers over packed tokens, with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rd_torch.backbone.attention import Rotation
from rd_torch.backbone.backbone import Backbone, MissingHead, Taken
from rd_torch.backbone.layer import AttentionSink, Layer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import ResidualNorm, at_least_float32
from rd_torch.modules import ModuleRow, row_of

EMBEDDING = "embed_tokens.weight"


class Encoder(Backbone):
    """A backbone that embeds tokens, runs layer after layer over the packed tokens, and ends with a norm.

    No work is done on padding, attention maps are built only when asked for, and the residual stream is
    float32 where weights are half. A family sets the modules below and says how tokens enter.

    Attributes:
        embed_tokens: table of the tokens' embeddings.
        vocab_size: number of rows of that table, some of which may stand for no token.
        hidden_dim: number of features inside the feed-forward blocks.
        layers: the layers, from the first.
    """

    vocab_size: ClassVar[int]
    hidden_dim: int
    embed_tokens: nn.Embedding
    layers: ModuleRow[Layer]

    @property
    def final_norm(self) -> ResidualNorm:
        """The LayerNorm after the last layer."""
        raise NotImplementedError

    @property
    def has_lm_head(self) -> bool:
        """Whether the checkpoint had a language-model head."""
        return not isinstance(self.get_submodule("lm_head"), MissingHead)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, read from a norm, because norms keep it where other layers are quantised."""
        return self.final_norm.weight.dtype

    @property
    def depth(self) -> int:
        """Number of layers that are there, fewer than `num_layers` in a backbone that was cut."""
        return len(self.layers)

    def _cut(self, layer: int) -> Self:
        """Return a backbone of the same modules as far as a layer; nothing is copied."""
        with torch.device("meta"):
            cut = self.of_level(self.level("cut"))
        for name, part in self.named_children():
            setattr(cut, name, MissingHead() if name in self.heads else part)
        cut.layers = row_of(list(self.layers)[:layer])
        cut.reference, cut.checkpointing = self.reference, self.checkpointing
        cut.training = self.training
        return cut

    def forward(
        self,
        tokens: Tensor,
        packing: Packing,
        sink: AttentionSink | None = None,
        *,
        taken: Taken | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the layers, as far as the last one that is taken; see `Backbone.forward`.

        Args:
            tokens: `(batch, time)` ids, or `(batch, time, len(alphabet))` distributions.
            packing: packing of the tokens that are no padding.
            sink: function that is called with the attention maps of each layer that runs.
            taken: the layers whose hidden states are returned; by default the last one alone.

        Returns:
            `(tokens, width)` final hidden states; or, with `taken`, a tuple of those of each layer.
        """
        rotation = self.rotation(packing.positions)
        exact = rotation[0].dtype  # that of the angles: it is no half type, and no weight is read for it
        x = self.embedded(*self.weigh(tokens, packing, exact))
        checkpointed = self.checkpointing and torch.is_grad_enabled() and sink is None

        def run(layer: Layer, x: Tensor) -> Tensor:
            """Return the residual stream after a layer."""
            if checkpointed:
                return checkpoint(layer, x, packing, rotation, use_reentrant=False)
            return layer(x, packing, rotation, sink)

        states = self.hidden_states(x, run, taken or Taken((self.depth,)))
        return states if taken else states[0]

    def hidden_states(
        self, x: Tensor, run: Callable[[Layer, Tensor], Tensor], taken: Taken
    ) -> tuple[Tensor, ...]:
        """Run the layers, as far as the last one that is taken, and return its hidden states and the others'.

        Args:
            x: `(tokens, width)` residual stream before the first layer.
            run: function of a layer and the residual stream before it that returns the one after it.
            taken: the layers whose hidden states are returned.
        """
        states = {}
        for number, layer in enumerate(list(self.layers)[: max(taken.layers)], start=1):
            x = run(layer, x)
            if number in taken.layers:
                is_final = taken.final_norm or number == self.num_layers
                states[number] = self.final_norm(x) if is_final else x
        return tuple(states[number] for number in taken.layers)

    def weigh(self, tokens: Tensor, packing: Packing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Pack tokens, and say by what their embeddings are multiplied, which is 1 in most families.

        Args:
            tokens: `(batch, time)` ids, or `(batch, time, 33)` distributions.
            packing: packing of the tokens that are no padding.
            dtype: dtype to compute in.

        Returns:
            `(tokens,)` packed ids, or `(tokens, 33)` packed distributions in `dtype`; and the `(tokens,)`
            factors of their embeddings.
        """
        packed = packing.pack(tokens)
        packed = packed.to(dtype) if tokens.is_floating_point() else packed
        # `len` would make a number of it, so that an exported file took batches of this size alone.
        return packed, packed.new_ones(packed.shape[:1], dtype=dtype)

    def embedded(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return the `(tokens, width)` residual stream before the first layer.

        Args:
            packed: `(tokens,)` ids, or `(tokens, 33)` distributions, as `weigh` returns them.
            scale: `(tokens,)` factors of the embeddings.
        """
        if not packed.is_floating_point():
            rows = self.embed_tokens(packed)
            return rows.to(at_least_float32(rows.dtype)) * scale[:, None]
        table = self.embed_tokens(torch.arange(packed.shape[-1], device=packed.device))
        with torch.autocast(packed.device.type, enabled=False):
            return torch.matmul(packed, table.to(packed.dtype)) * scale[:, None]

    def rotation(self, positions: Tensor) -> Rotation:
        """Return cosines and signed sines of `(tokens,)` positions, which are the same in all layers."""
        raise NotImplementedError

    def top_modules(self, count: int) -> list[nn.Module]:
        """Return the top `count` layers, and the last LayerNorm."""
        return [*list(self.layers)[self.depth - count :], self.final_norm]
