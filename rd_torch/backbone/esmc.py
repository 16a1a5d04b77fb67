"""`ESMC`: an ESM Cambrian encoder as a plain module over packed tokens.

Parameters have the names, and numerics are those, of transformers' `EsmcModel` (weights: biohub/ESMC-300M,
-600M and -6B). What differs from ESM-2: linear layers without biases, a LayerNorm of queries and keys over
the whole width, a gated feed-forward block, residual branches that are scaled by the depth of the model,
angles that no checkpoint stores, and no token dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.backbone.attention import RotaryEmbedding, Rotation
from rd_torch.backbone.encoder import Encoder
from rd_torch.backbone.layer import Heads, Layer, recompute, rotated_heads
from rd_torch.backbone.linear import project
from rd_torch.backbone.packing import is_recorded
from rd_torch.backbone.precision import BranchNorm, ResidualNorm, at_least_float32
from rd_torch.levels import ESMC_ALPHABET, Level
from rd_torch.modules import ModuleRow, row_of

DEPTH_WITHOUT_SCALE = 36
"""Number of layers of the model whose residual branches are added as they are."""

HIDDEN_MULTIPLE = 256


def hidden_width(width: int) -> int:
    """Return how wide the feed-forward block of a published size is: 8/3 of the width, rounded up."""
    return HIDDEN_MULTIPLE * ceil(8 * width / 3 / HIDDEN_MULTIPLE)


class ESMCAttention(nn.Module):
    """The projections of multi-head self-attention, with a LayerNorm of queries and of keys.

    In float32 PyTorch computes their products, not oneDNN: oneDNN's round twice as much, which attention
    amplifies. With them the 36 layers of 600M were up to 2.6e-5 standard deviations from transformers.

    Args:
        width: number of features of a token.
        attention_heads: number of heads.
    """

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = ResidualNorm(width, bias=False)
        self.k_norm = ResidualNorm(width, bias=False)

    def forward(self, x: Tensor, rotation: Rotation) -> Heads:
        """Return rotated queries, rotated keys, and values, each `(tokens, heads, size)`.

        Args:
            x: `(tokens, width)` normalised residual stream.
            rotation: cosines and signed sines of the tokens' angles.
        """
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        return rotated_heads(q, k, v, self.attention_heads, rotation)


class SwiGLU(nn.Module):
    """The feed-forward block `(silu(x G) * x U) D` (Shazeer, arXiv 2002.05202).

    Args:
        width: number of features of a token.
        hidden: number of features inside.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(tokens, width)` of `(tokens, width)`."""
        gate, up = project(self.gate_proj, x), project(self.up_proj, x)
        if torch.compiler.is_compiling() or is_recorded(gate, up):
            inner = functional.silu(gate) * up
        else:
            inner = functional.silu(gate).mul_(up)  # fresh memory would cost as much time again
        with recompute(inner, lambda: functional.silu(gate) * up):
            return project(self.down_proj, inner)


class ESMCLayer(Layer):
    """One pre-norm layer, both branches of which are divided by `sqrt(layers / 36)`.

    Args:
        width: number of features of a token.
        attention_heads: number of heads.
        hidden: number of features inside the feed-forward block.
        num_layers: number of layers of the model.
    """

    def __init__(self, width: int, attention_heads: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.self_attn = ESMCAttention(width, attention_heads)
        self.mlp = SwiGLU(width, hidden)
        self.input_layernorm = BranchNorm(width)
        self.post_attention_layernorm = BranchNorm(width)
        self.share = 1 / sqrt(num_layers / DEPTH_WITHOUT_SCALE)

    def begin(self, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        """Return rotated queries, rotated keys and values of each token, as `Layer.begin` says."""
        return self.self_attn(self.input_layernorm(x), (cos, sin))

    def finish(self, x: Tensor, mixed: Tensor) -> tuple[Tensor]:
        """Return the stream after attention's projection and the feed-forward block; see `Layer.finish`."""
        x = self._add_share(x, self.self_attn.o_proj(mixed.flatten(1)))
        return (self._add_share(x, self.mlp(self.post_attention_layernorm(x))),)

    def _add_share(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the stream with the share of a branch that its depth leaves it: `x + share * branch`."""
        if torch.compiler.is_compiling():  # PyTorch's compiler forgets an alpha beside a matrix product
            return x + self.share * branch.to(x.dtype)
        return torch.add(x, branch, alpha=self.share)


class ESMCHead(nn.Module):
    """The language-model head: logits are `LayerNorm(gelu(x A' + a)) D' + d`.

    Args:
        width: number of features of a hidden state.
        vocab_size: number of logits.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, features: Tensor) -> Tensor:
        """Return `(..., 64)` logits of `(..., width)` features, in the dtype of the weights."""
        hidden = functional.gelu(self.dense(features.to(self.layer_norm.weight.dtype)))
        return self.decoder(self.layer_norm(hidden))


class ESMC(Encoder):
    """An ESM-C encoder of any size, from token ids to final hidden states of the real tokens.

    Args:
        num_layers: number of transformer layers.
        embed_dim: number of features of a token.
        attention_heads: number of attention heads in each layer.
        hidden_dim: number of features inside the feed-forward blocks; by default that of the published sizes,
            8/3 of `embed_dim`, rounded up to a multiple of 256.

    Examples:
        >>> backbone = rd_torch.ESMC(num_layers=2, embed_dim=32, attention_heads=2)  # random weights
        >>> chain = rd_torch.RDModel({"tiny": backbone}, [])
        >>> rd_torch.embed(chain, ["MQIFVK"]).shape
        (1, 32)
    """

    family = "esmc"
    heads = ("lm_head",)
    own_modules = frozenset({ESMCLayer, ESMCAttention, SwiGLU, RotaryEmbedding})
    alphabet = ESMC_ALPHABET
    vocab_size = 64  # rows above 32 stand for no token
    layers: ModuleRow[ESMCLayer]

    def __init__(
        self,
        num_layers: int = 36,
        embed_dim: int = 1152,
        attention_heads: int = 18,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.embed_dim = embed_dim
        self.attention_heads = attention_heads
        usual = hidden_width(embed_dim)
        self.hidden_dim = hidden_dim or usual
        self.facts = {} if self.hidden_dim == usual else {"hidden_dim": hidden_dim}
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(self.vocab_size, embed_dim), freeze=False
        )
        if not self.embed_tokens.weight.is_meta:  # where normal_ would import the compiler for a second
            nn.init.normal_(self.embed_tokens.weight)
        self.layers = row_of(
            ESMCLayer(embed_dim, attention_heads, self.hidden_dim, num_layers) for _ in range(num_layers)
        )
        self.norm = ResidualNorm(embed_dim, bias=False)
        self.rotary_emb = RotaryEmbedding(embed_dim // attention_heads, stored=False)
        self.lm_head = ESMCHead(embed_dim, self.vocab_size)

    @classmethod
    def from_tensors(cls, level: Level, tensors: Mapping[str, Tensor]) -> Self:
        """Make a backbone around tensors by transformers' names; see `Encoder.from_tensors`."""
        module = super().from_tensors(level, tensors)
        # The angles come from no tensor; where weights are half, they stay float32.
        module.rotary_emb.to(module.device, at_least_float32(module.dtype))
        return module

    @classmethod
    def of_level(cls, level: Level) -> Self:
        """Return a backbone of a level's shape, with fresh weights."""
        return cls(*level.shape, **level.facts)

    @property
    def final_norm(self) -> ResidualNorm:
        """The LayerNorm after the last layer."""
        return self.norm

    def rotation(self, positions: Tensor) -> Rotation:
        """Return cosines and signed sines of `(tokens,)` positions, which are the same in all layers."""
        return self.rotary_emb(positions)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Return `(..., 64)` logits of `(..., width)` final hidden states; None where the head is missing."""
        return self.lm_head(hidden) if self.has_lm_head else None
