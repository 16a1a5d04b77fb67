"""`Encoder`: a backbone that is a stack of layers over packed tokens, with rotary positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rd_torch.backbone.attention import Rotation
from rd_torch.backbone.backbone import Backbone, MissingHead
from rd_torch.backbone.layer import AttentionSink, Layer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import ResidualNorm, at_least_float32
from rd_torch.modules import ModuleRow

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

    def forward(self, tokens: Tensor, packing: Packing, sink: AttentionSink | None = None) -> Tensor:
        """Run all layers and the last LayerNorm; arguments and result are those of `Backbone.forward`."""
        rotation = self.rotation(packing.positions)
        exact = rotation[0].dtype  # that of the angles: it is no half type, and no weight is read for it
        x = self.embedded(*self.weigh(tokens, packing, exact))
        checkpointed = self.checkpointing and torch.is_grad_enabled() and sink is None
        for layer in self.layers:
            if checkpointed:
                x = checkpoint(layer, x, packing, rotation, use_reentrant=False)
            else:
                x = layer(x, packing, rotation, sink)
        return self.final_norm(x)

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
        return [*list(self.layers)[self.num_layers - count :], self.final_norm]
