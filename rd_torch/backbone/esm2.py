"""One backbone: ESM-2 as a plain module over packed tokens.

Parameter names are fair-esm's, so that its state dicts load unchanged; numerics are fair-esm's too
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

# Training masked 15 % of the residues and blanked 80 % of those: the share of the embedding that
# token dropout left on average, to which every sequence is scaled back.
MEAN_SHARE_KEPT = 1 - 0.15 * 0.8

# Tokens of a soft sequence that count as not masked at the least, where all but nothing is at `<mask>`.
LEAST_KEPT = 1e-6

EMBEDDING = "embed_tokens.weight"

_FAIR_ESMS = ("esm.model.esm2", "ESM2")


def token_dropout(tokens: Tensor, packing: Packing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What token dropout makes of a batch: packed tokens, and the factor of each one's embedding.

    `<mask>` enters as zeros. The rest is scaled by 0.88 over the share of the sequence's tokens that are
    not masked, computed in `dtype`. Of distributions, `(batch, time, 33)`, the share at `<mask>` enters as
    zeros and counts as masked.

    Returns:
        `(tokens,)` ids, or `(tokens, 33)` distributions in `dtype` without what is at `<mask>`; `(tokens,)`.
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


def _own_angles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every layer's `inv_freq`, in float32 at least and, where layers share one, a copy each."""
    angles: dict[str, Tensor] = {}
    for name, inv_freq in tensors.items():
        if name.endswith("rot_emb.inv_freq"):
            exact = inv_freq.to(at_least_float32(inv_freq.dtype))
            shared = any(exact.data_ptr() == other.data_ptr() for other in angles.values())
            angles[name] = exact.clone() if shared else exact
    return angles


def _drop_twin(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Takes out of what is loaded the language-model head's weight, which is the embeddings' second name."""
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
    """Whether this is an `esm.ESM2` object; told by name, so that nothing called `esm` need be installed."""
    return any((kind.__module__, kind.__name__) == _FAIR_ESMS for kind in type(module).__mro__)


class MissingHead(nn.Module):
    """Stands where a checkpoint has no head, and says so to whoever asks for it."""

    def forward(self, *_: object) -> Tensor:
        """Raises a RuntimeError."""
        raise RuntimeError(
            "expected a backbone with this head, got one whose checkpoint has none: load ESM-2's own "
            "file, for fair-esm's beside its `-contact-regression.pt`"
        )


class ESM2(nn.Module):
    """An ESM-2 encoder of any size: token ids in, final hidden states of the real tokens out.

    Args:
        num_layers: transformer layers.
        embed_dim: features a token.
        attention_heads: heads a layer.

    Attributes:
        reference: where the weights lie on the Hub, if they came from there.
        checkpointing: whether layers are computed again in the backward pass, in place of keeping what
            they made on the way.

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
        # without padding_idx, which would keep the language-model head's gradient from one row of the table
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
        """A module around the given tensors under fair-esm's names, which it shares, not copies.

        A head that the tensors lack altogether is a `MissingHead`.

        Raises:
            ValueError: when names or shapes are not the level's, or layers disagree on their angles.
        """
        with torch.device("meta"):
            module = cls(level.num_layers, level.width, level.attention_heads)
        module.reference = level.reference
        for head in ("lm_head", "contact_head"):
            if not any(name.startswith(f"{head}.") for name in tensors):
                setattr(module, head, MissingHead())
        angles = _own_angles(tensors)
        if len({tuple(inv_freq.tolist()) for inv_freq in angles.values()}) > 1:
            raise ValueError(f"expected one inv_freq for all layers of level {level.name}, got several")
        try:
            module.load_state_dict({**tensors, **angles}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"expected the tensors of level {level.name}, got others: {error}") from error
        return module

    @classmethod
    def sharing(cls, module: nn.Module) -> ESM2:
        """The module itself, or one of ours around the tensors of an `esm.ESM2` object.

        Raises:
            TypeError: for a module of another kind.
            ValueError: for one without token dropout, which is not ESM-2's.
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
        """Ties the language-model head to whatever comes in the embedding's place, such as an adapter."""
        super().__setattr__(name, value)
        if name == "embed_tokens" and isinstance(head := self._modules.get("lm_head"), LMHead):
            head.tie(value)

    @property
    def has_lm_head(self) -> bool:
        """Whether the checkpoint had a language-model head."""
        return not isinstance(self.lm_head, MissingHead)

    def tensors(self) -> StateDict:
        """All tensors by fair-esm's names, but for `lm_head.weight`, which is `embed_tokens.weight`."""
        return StateDict(self)

    def freeze_heads(self) -> None:
        """Stops the heads from training, but for the weight that is tied to the embeddings."""
        for head in (self.lm_head, self.contact_head):
            head.requires_grad_(False)

    def embedding_tensors(self) -> StateDict:
        """The tensors that embeddings depend on, by fair-esm's names: all but the heads'."""
        return StateDict(self, lambda name: not name.startswith(("lm_head.", "contact_head.")))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, which the norms keep where others are quantised."""
        return self.emb_layer_norm_after.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self)

    def require_device_of(self, tokens: Tensor) -> None:
        """Raises a ValueError unless the weights are where the tokens are."""
        device = device_of(self)
        if tokens.device != device and not (device.type == "meta" and is_fetched(self)):
            raise ValueError(
                f"expected tokens and backbones on one device, got {tokens.device} and {device}: "
                "move them with .to"
            )

    def forward(self, tokens: Tensor, packing: Packing, sink: AttentionSink | None = None) -> Tensor:
        """Runs all layers and the last LayerNorm.

        Args:
            tokens: `(batch, time)` integer ids of fair-esm's alphabet, or `(batch, time, 33)` distributions.
            packing: the packing of the tokens that are no padding.
            sink: called once a layer with its `(batch, heads, time, time)` attention maps.

        Returns:
            `(tokens, width)` final hidden states in packed order, in float32 for half-precision
            weights; `packing.unpack` pads them.
        """
        rotation = self.rotation(packing.positions)
        exact = rotation[0].dtype  # angles are never in a half type, and asking them reads no weight
        x = self.embedded(*token_dropout(tokens, packing, exact))
        checkpointed = self.checkpointing and torch.is_grad_enabled() and sink is None
        for layer in self.layers:
            if checkpointed:
                x = checkpoint(layer, x, packing, rotation, use_reentrant=False)
            else:
                x = layer(x, packing, rotation, sink)
        return self.emb_layer_norm_after(x)

    def embedded(self, packed: Tensor, scale: Tensor) -> Tensor:
        """`(tokens, width)` the residual stream's beginning; arguments as `token_dropout` gives them."""
        if not packed.is_floating_point():
            rows = self.embed_tokens(packed)
            return rows.to(at_least_float32(rows.dtype)) * scale[:, None]
        table = self.embed_tokens(torch.arange(len(ALPHABET), device=packed.device))
        with torch.autocast(packed.device.type, enabled=False):
            return torch.matmul(packed, table.to(packed.dtype)) * scale[:, None]

    def rotation(self, positions: Tensor) -> Rotation:
        """Cosines and signed sines of `(tokens,)` positions."""
        return self.layers[0].self_attn.rot_emb(positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head's logits, `(..., 33)`, of final hidden states."""
        return self.lm_head(hidden)
