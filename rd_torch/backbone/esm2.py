"""`ESM2`: one backbone as a plain module over packed tokens.

Parameters have fair-esm's names, so that its state dicts load unchanged, and numerics are fair-esm's too
(Lin et al., Science 2023, doi:10.1126/science.ade2574). Three things differ: no work is done on padding,
attention maps are built only when asked for, and the residual stream is float32 where weights are half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rd_torch.backbone.attention import RotaryEmbedding, Rotation
from rd_torch.backbone.encoder import EMBEDDING, Encoder
from rd_torch.backbone.esm2_heads import ContactHead, LMHead
from rd_torch.backbone.layer import Heads, Layer, recompute, rotated_heads
from rd_torch.backbone.linear import project
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import BranchNorm, ResidualNorm, at_least_float32
from rd_torch.levels import ALPHABET, Level
from rd_torch.modules import ModuleRow, row_of

# Training turned 80 % of 15 % of the residues into `<mask>`, whose embeddings token dropout set to zero. This
# share was left on average, and the embeddings of every sequence are scaled to it.
MEAN_SHARE_KEPT = 1 - 0.15 * 0.8

# Least number of tokens of a soft sequence that count as not masked: a choice, so that a sequence which is
# `<mask>` all over does not divide by zero.
LEAST_KEPT = 1e-6

_FAIR_ESMS = ("esm.model.esm2", "ESM2")


def token_dropout(tokens: Tensor, packing: Packing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Apply token dropout, which ESM-2 does at inference too, to a batch.

    The embedding of `<mask>` becomes zeros. Others are multiplied by 0.88 over the share of the sequence's
    tokens that are not masked. In a distribution the probability of `<mask>` counts as that much of a masked
    token.

    Args:
        tokens: `(batch, time)` ids, or `(batch, time, 33)` distributions.
        packing: packing of the tokens that are no padding.
        dtype: dtype to compute in.

    Returns:
        `(tokens,)` packed ids, or `(tokens, 33)` packed distributions in `dtype` with zeros at `<mask>`; and
        the `(tokens,)` factors of their embeddings.
    """
    packed = packing.pack(tokens)
    count = packing.real.sum(1)
    if tokens.is_floating_point():
        masked = tokens[..., ALPHABET.mask_idx].masked_fill(~packing.real, 0).to(dtype).sum(1)
        kept = (count - masked).clamp(min=LEAST_KEPT)
        at_mask = torch.arange(len(ALPHABET), device=tokens.device) == ALPHABET.mask_idx
        packed = packed.to(dtype).masked_fill(at_mask, 0)
        return packed, (MEAN_SHARE_KEPT * (count / kept))[packing.sequence]
    masked = (tokens == ALPHABET.mask_idx).sum(1)
    scale = MEAN_SHARE_KEPT * (count / (count - masked).clamp(min=1).to(dtype))
    return packed, scale[packing.sequence].masked_fill(packed == ALPHABET.mask_idx, 0)


def _copy_angles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `inv_freq` of every layer, in float32 at least, and copied where layers share it."""
    angles: dict[str, Tensor] = {}
    for name, inv_freq in tensors.items():
        if name.endswith("rot_emb.inv_freq"):
            exact = inv_freq.to(at_least_float32(inv_freq.dtype))
            shared = any(exact.data_ptr() == other.data_ptr() for other in angles.values())
            angles[name] = exact.clone() if shared else exact
    return angles


def _drop_twin(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Remove the language-model head's weight from a state dict: it is the embedding under a second name."""
    *_, errors = others
    twin = state.get(f"{prefix}lm_head.weight")
    ours = cast(ESM2, module)
    if twin is None or not (ours.has_lm_head and ours.tied):
        return
    table = state.get(f"{prefix}{EMBEDDING}", twin)
    if twin is not table and not (twin.is_meta or table.is_meta or torch.equal(twin, table)):
        errors.append(
            f"expected {prefix}lm_head.weight to be {prefix}{EMBEDDING}, to which it is tied, got another one"
        )
    del state[f"{prefix}lm_head.weight"]


def _is_fair_esms(module: object) -> bool:
    """Return whether a module is an `esm.ESM2`, by its class's name, so that `esm` need not be installed."""
    return any((kind.__module__, kind.__name__) == _FAIR_ESMS for kind in type(module).__mro__)


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
        q, k, v = (project(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return rotated_heads(q, k, v, self.attention_heads, rotation)


class TransformerLayer(Layer):
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

    def begin(self, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        """Return rotated queries, rotated keys and values of each token, as `Layer.begin` says."""
        return self.self_attn(self.self_attn_layer_norm(x), (cos, sin))

    def finish(self, x: Tensor, mixed: Tensor) -> tuple[Tensor]:
        """Return the stream after attention's projection and the feed-forward block; see `Layer.finish`."""
        x = x + project(self.self_attn.out_proj, mixed.flatten(1))
        hidden = project(self.fc1, self.final_layer_norm(x))
        inner = functional.gelu(hidden)
        with recompute(inner, lambda: functional.gelu(hidden)):
            return (x + project(self.fc2, inner),)


class ESM2(Encoder):
    """An ESM-2 encoder of any size, from token ids to final hidden states of the real tokens.

    Args:
        num_layers: number of transformer layers.
        embed_dim: number of features of a token.
        attention_heads: number of attention heads in each layer.
        token_dropout: whether embeddings are scaled by the share of tokens that are not masked, as in ESM-2;
            relatives that were trained from it, such as DPLM, may have given that up.
        tied: whether the language-model head's weight is the table of embeddings, as in ESM-2.

    Examples:
        >>> backbone = rd_torch.ESM2(num_layers=2, embed_dim=32, attention_heads=4)  # random weights
        >>> chain = rd_torch.RDModel({"tiny": backbone}, [])
        >>> rd_torch.embed(chain, ["MQIFVK"]).shape
        (1, 32)
    """

    family = "esm2"
    heads = ("lm_head", "contact_head")
    own_modules = frozenset({TransformerLayer, SelfAttention, RotaryEmbedding})
    alphabet = ALPHABET
    vocab_size = len(ALPHABET)
    layers: ModuleRow[TransformerLayer]

    def __init__(
        self,
        num_layers: int = 33,
        embed_dim: int = 1280,
        attention_heads: int = 20,
        *,
        token_dropout: bool = True,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.facts = {
            name: False for name, value in (("token_dropout", token_dropout), ("tied", tied)) if not value
        }
        self.num_layers = num_layers
        self.embed_dim = embed_dim
        self.attention_heads = attention_heads
        self.hidden_dim = 4 * embed_dim
        # Without padding_idx, which would keep the language-model head's gradient from one row of the table.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(len(ALPHABET), embed_dim), freeze=False)
        if not self.embed_tokens.weight.is_meta:  # where normal_ would import the compiler for a second
            nn.init.normal_(self.embed_tokens.weight)
        self.layers = row_of(TransformerLayer(embed_dim, attention_heads) for _ in range(num_layers))
        self.emb_layer_norm_after = ResidualNorm(embed_dim)
        untied = None if tied else nn.Parameter(torch.empty(len(ALPHABET), embed_dim))
        if untied is not None and not untied.is_meta:
            nn.init.normal_(untied)
        self.lm_head = LMHead(embed_dim, len(ALPHABET), self.embed_tokens if untied is None else untied)
        self.contact_head = ContactHead(
            num_layers * attention_heads, prepend_bos=True, append_eos=True, eos_idx=ALPHABET.eos_idx
        )
        self.register_load_state_dict_pre_hook(_drop_twin)

    @classmethod
    def from_tensors(cls, level: Level, tensors: Mapping[str, Tensor]) -> Self:
        """Make a backbone around tensors, which are shared, not copied.

        Args:
            level: shape of the backbone.
            tensors: tensors under fair-esm's names. If those of a head are all missing, the head becomes a
                `MissingHead`.

        Returns:
            The backbone.

        Raises:
            ValueError: for names or shapes that are not the level's, or layers whose angles differ.
        """
        angles = _copy_angles(tensors)
        if len({tuple(inv_freq.tolist()) for inv_freq in angles.values()}) > 1:
            raise ValueError(f"expected one inv_freq for all layers of level {level.name}, got several")
        return super().from_tensors(level, {**tensors, **angles})

    @classmethod
    def of_level(cls, level: Level) -> Self:
        """Return a backbone of a level's shape, with fresh weights."""
        return cls(*level.shape, **level.facts)

    @classmethod
    def sharing(cls, module: nn.Module) -> ESM2:
        """Return the module itself if it is an `ESM2`, or one that shares the tensors of an `esm.ESM2`.

        Args:
            module: backbone of either kind.

        Raises:
            TypeError: for a module of another kind.
        """
        if isinstance(module, cls):
            return module
        if not _is_fair_esms(module):
            raise TypeError(f"expected a backbone of rd_torch or an esm.ESM2, got {type(module).__name__}")
        theirs = cast(Any, module)
        trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        facts = {} if theirs.token_dropout else {"token_dropout": False}
        level = Level("shared", theirs.num_layers, theirs.embed_dim, theirs.attention_heads, facts=facts)
        ours = cls.from_tensors(level, module.state_dict(keep_vars=True)).train(module.training)
        for name, parameter in ours.named_parameters():
            parameter.requires_grad_(trainable[name])
        return ours

    def __setattr__(self, name: str, value: Any) -> None:
        """Tie the language-model head to whatever takes the embedding's place, such as an adapter."""
        super().__setattr__(name, value)
        head = self._modules.get("lm_head") if name == "embed_tokens" else None
        if isinstance(head, LMHead) and self.tied:
            head.tie(value)

    @property
    def final_norm(self) -> ResidualNorm:
        """The LayerNorm after the last layer."""
        return self.emb_layer_norm_after

    @property
    def tied(self) -> bool:
        """Whether the language-model head's weight is the table of embeddings."""
        return bool(self.facts.get("tied", True))

    def weigh(self, tokens: Tensor, packing: Packing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Apply token dropout; arguments and results are those of `Encoder.weigh`."""
        if self.facts.get("token_dropout", True):
            return token_dropout(tokens, packing, dtype)
        return super().weigh(tokens, packing, dtype)

    def rotation(self, positions: Tensor) -> Rotation:
        """Return cosines and signed sines of `(tokens,)` positions, which are the same in all layers."""
        return self.layers[0].self_attn.rot_emb(positions)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Return `(..., 33)` logits of `(..., width)` final hidden states; None where the head is missing."""
        return self.lm_head(hidden) if self.has_lm_head else None

    def contacts(self, ids: Tensor, attentions: Tensor) -> Tensor:
        """Return contact probabilities by the contact head, as `Backbone.contacts` says."""
        return self.contact_head(ids, attentions)
