"""`ESM2`: one backbone as a plain module over packed tokens.

Parameters have fair-esm's names, so that its state dicts load unchanged, and numerics are fair-esm's too
(Lin et al., Science 2023, doi:10.1126/science.ade2574). Three things differ: no work is done on padding,
attention maps are built only when asked for, and the residual stream is float32 where weights are half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rd_torch.backbone.attention import Rotation
from rd_torch.backbone.esm2_heads import ContactHead, LMHead
from rd_torch.backbone.layer import AttentionSink, TransformerLayer
from rd_torch.backbone.packing import Packing
from rd_torch.backbone.precision import ResidualNorm, at_least_float32
from rd_torch.config import ALPHABET, Level, Reference
from rd_torch.modules import StateDict, device_of, is_fetched, row_of

# Training turned 80 % of 15 % of the residues into `<mask>`, whose embeddings token dropout set to zero. This
# share was left on average, and the embeddings of every sequence are scaled to it.
MEAN_SHARE_KEPT = 1 - 0.15 * 0.8

# Least number of tokens of a soft sequence that count as not masked: a choice, so that a sequence which is
# `<mask>` all over does not divide by zero.
LEAST_KEPT = 1e-6

EMBEDDING = "embed_tokens.weight"

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
    if twin is None or not cast(ESM2, module).has_lm_head:
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


class MissingHead(nn.Module):
    """A module in place of a head that the checkpoint does not have; a call of it is an error."""

    def forward(self, *_: object) -> Tensor:
        """Raise a RuntimeError."""
        raise RuntimeError(
            "expected a backbone with this head, got one whose checkpoint has none: load ESM-2's own file; a "
            "file of fair-esm's needs its `-contact-regression.pt` beside it"
        )


class ESM2(nn.Module):
    """An ESM-2 encoder of any size, from token ids to final hidden states of the real tokens.

    Args:
        num_layers: number of transformer layers.
        embed_dim: number of features of a token.
        attention_heads: number of attention heads in each layer.

    Attributes:
        reference: where the weights lie on the Hub; None where they did not come from there.
        checkpointing: whether the backward pass computes layers again, so that their activations are not
            kept.

    Examples:
        >>> backbone = rd_torch.ESM2(num_layers=2, embed_dim=32, attention_heads=4)  # random weights
        >>> chain = rd_torch.RDModel({"tiny": backbone}, [])
        >>> rd_torch.embed(chain, ["MQIFVK"]).shape
        (1, 32)
    """

    def __init__(self, num_layers: int = 33, embed_dim: int = 1280, attention_heads: int = 20) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.embed_dim = embed_dim
        self.attention_heads = attention_heads
        self.reference: Reference | None = None
        self.checkpointing = False
        # Without padding_idx, which would keep the language-model head's gradient from one row of the table.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(len(ALPHABET), embed_dim), freeze=False)
        if not self.embed_tokens.weight.is_meta:  # where normal_ would import the compiler for a second
            nn.init.normal_(self.embed_tokens.weight)
        self.layers = row_of(TransformerLayer(embed_dim, attention_heads) for _ in range(num_layers))
        self.emb_layer_norm_after = ResidualNorm(embed_dim)
        self.lm_head = LMHead(embed_dim, len(ALPHABET), self.embed_tokens)
        self.contact_head = ContactHead(
            num_layers * attention_heads, prepend_bos=True, append_eos=True, eos_idx=ALPHABET.eos_idx
        )
        self.register_load_state_dict_pre_hook(_drop_twin)

    @classmethod
    def from_tensors(cls, level: Level, tensors: Mapping[str, Tensor]) -> ESM2:
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
        with torch.device("meta"):  # without memory, which the tensors bring
            module = cls(*level.shape)
        module.reference = level.reference
        for head in ("lm_head", "contact_head"):
            if not any(name.startswith(f"{head}.") for name in tensors):
                setattr(module, head, MissingHead())
        angles = _copy_angles(tensors)
        if len({tuple(inv_freq.tolist()) for inv_freq in angles.values()}) > 1:
            raise ValueError(f"expected one inv_freq for all layers of level {level.name}, got several")
        try:
            module.load_state_dict({**tensors, **angles}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"expected the tensors of level {level.name}, got others: {error}") from error
        return module

    @classmethod
    def sharing(cls, module: nn.Module) -> ESM2:
        """Return the module itself if it is an `ESM2`, or one that shares the tensors of an `esm.ESM2`.

        Args:
            module: backbone of either kind.

        Raises:
            TypeError: for a module of another kind.
            ValueError: for an `esm.ESM2` without token dropout, which ESM-2 was trained with.
        """
        if isinstance(module, cls):
            return module
        if not _is_fair_esms(module):
            raise TypeError(f"expected a backbone of rd_torch.ESM2 or esm.ESM2, got {type(module).__name__}")
        theirs = cast(Any, module)
        if not theirs.token_dropout:
            raise ValueError("expected an esm.ESM2 with token_dropout, as ESM-2 was trained, got one without")
        trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        level = Level("shared", theirs.num_layers, theirs.embed_dim, theirs.attention_heads)
        ours = cls.from_tensors(level, module.state_dict(keep_vars=True)).train(module.training)
        for name, parameter in ours.named_parameters():
            parameter.requires_grad_(trainable[name])
        return ours

    def __setattr__(self, name: str, value: Any) -> None:
        """Tie the language-model head to whatever takes the embedding's place, such as an adapter."""
        super().__setattr__(name, value)
        if name == "embed_tokens" and isinstance(head := self._modules.get("lm_head"), LMHead):
            head.tie(value)

    @property
    def has_lm_head(self) -> bool:
        """Whether the checkpoint had a language-model head."""
        return not isinstance(self.lm_head, MissingHead)

    def tensors(self) -> StateDict:
        """Return all tensors by fair-esm's names; `lm_head.weight` is `embed_tokens.weight` and left out."""
        return StateDict(self)

    def freeze_heads(self) -> None:
        """Stop the heads from training; the weight that is tied to the embedding still trains."""
        for head in (self.lm_head, self.contact_head):
            head.requires_grad_(False)

    def embedding_tensors(self) -> StateDict:
        """Return the tensors that embeddings depend on, by fair-esm's names: all but those of the heads."""
        return StateDict(self, lambda name: not name.startswith(("lm_head.", "contact_head.")))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, read from a norm, because norms keep it where other layers are quantised."""
        return self.emb_layer_norm_after.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device that token ids must be on."""
        return device_of(self)

    def require_device_of(self, tokens: Tensor) -> None:
        """Refuse tokens that are on another device than the weights.

        Args:
            tokens: ids or distributions.

        Raises:
            ValueError: for tokens on another device.
        """
        device = device_of(self)
        if tokens.device != device and not (device.type == "meta" and is_fetched(self)):
            raise ValueError(
                f"expected tokens and backbones on one device, got {tokens.device} and {device}: "
                "move them with .to"
            )

    def forward(self, tokens: Tensor, packing: Packing, sink: AttentionSink | None = None) -> Tensor:
        """Run all layers and the last LayerNorm.

        Args:
            tokens: `(batch, time)` integer ids of fair-esm's alphabet, or `(batch, time, 33)` distributions.
            packing: packing of the tokens that are no padding.
            sink: function that is called with the `(batch, heads, time, time)` attention maps of each layer.

        Returns:
            `(tokens, width)` final hidden states in packed order, in float32 where weights are in a half
            type; `packing.unpack` pads them.
        """
        rotation = self.rotation(packing.positions)
        exact = rotation[0].dtype  # that of the angles: it is no half type, and no weight is read for it
        x = self.embedded(*token_dropout(tokens, packing, exact))
        checkpointed = self.checkpointing and torch.is_grad_enabled() and sink is None
        for layer in self.layers:
            if checkpointed:
                x = checkpoint(layer, x, packing, rotation, use_reentrant=False)
            else:
                x = layer(x, packing, rotation, sink)
        return self.emb_layer_norm_after(x)

    def embedded(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return the `(tokens, width)` residual stream before the first layer.

        Args:
            packed: `(tokens,)` ids, or `(tokens, 33)` distributions, as `token_dropout` returns them.
            scale: `(tokens,)` factors of the embeddings.
        """
        if not packed.is_floating_point():
            rows = self.embed_tokens(packed)
            return rows.to(at_least_float32(rows.dtype)) * scale[:, None]
        table = self.embed_tokens(torch.arange(len(ALPHABET), device=packed.device))
        with torch.autocast(packed.device.type, enabled=False):
            return torch.matmul(packed, table.to(packed.dtype)) * scale[:, None]

    def rotation(self, positions: Tensor) -> Rotation:
        """Return cosines and signed sines of `(tokens,)` positions, which are the same in all layers."""
        return self.layers[0].self_attn.rot_emb(positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return `(..., 33)` logits of `(..., width)` final hidden states, by the language-model head."""
        return self.lm_head(hidden)
