"""`Backbone`: what a chain asks of each of its backbones; a family of models is added as a subclass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from rd_torch.alphabet import Alphabet
from rd_torch.backbone.layer import AttentionSink
from rd_torch.backbone.packing import Packing
from rd_torch.levels import Level, Reference
from rd_torch.modules import StateDict, device_of, is_fetched


class Taken(NamedTuple):
    """Which hidden states are taken from a backbone as it runs.

    Attributes:
        layers: numbers of layers, rising, from 1.
        final_norm: whether the LayerNorm after the last layer acts on those of other layers too.
    """

    layers: tuple[int, ...]
    final_norm: bool = True


class TooManyTokensError(ValueError):
    """A sequence has more tokens than a backbone has positions for."""


class MissingHead(nn.Module):
    """A module in place of a head that the checkpoint does not have; a call of it is an error."""

    def forward(self, *_: object) -> Tensor:
        """Raise a RuntimeError."""
        raise RuntimeError(
            "expected a backbone with this head, got one whose checkpoint has none: load the family's own "
            "file; a file of fair-esm's needs its `-contact-regression.pt` beside it"
        )


class Backbone(nn.Module):
    """One protein language model as a chain sees it: token ids in, one vector for each real token out.

    Chains, fits, stores and heads know backbones by this class alone. A family is a subclass that sets the
    attributes below and computes `forward`; every other method has an answer that a family replaces where it
    can do more. The numbers must be such that a token's vector does not depend on what it is batched with.

    Attributes:
        family: name of the family, by which a checkpoint says how a level is read.
        alphabet: the alphabet that token ids are of. All backbones of a chain have the same.
        heads: names of the modules that embeddings do not depend on, such as a language-model head.
        own_modules: classes of the modules in a backbone; a module of another class, such as an adapter of
            PEFT, keeps a chain from being prepared or exported, which could skip what it does.
        embed_dim: number of features of a token's vector.
        num_layers: number of layers of the whole model.
        attention_heads: number of attention heads in each layer; 0 in a model without attention.
        facts: further facts of the architecture that a checkpoint has to state, as JSON takes them.
        reference: where the weights lie on the Hub; None where they did not come from there.
        checkpointing: whether the backward pass computes layers again, so that their activations are not
            kept.

    Examples:
        >>> backbone = rd_torch.ESM2(num_layers=2, embed_dim=32, attention_heads=4)
        >>> isinstance(backbone, rd_torch.Backbone), backbone.level("tiny").width
        (True, 32)
    """

    family: ClassVar[str]
    heads: ClassVar[Sequence[str]] = ()
    own_modules: ClassVar[frozenset[type[nn.Module]]] = frozenset()

    alphabet: Alphabet
    embed_dim: int
    num_layers: int
    attention_heads: int
    facts: Mapping[str, Any] = {}
    reference: Reference | None = None
    checkpointing: bool = False

    @classmethod
    def from_tensors(cls, level: Level, tensors: Mapping[str, Tensor]) -> Self:
        """Make a backbone around tensors, which are shared, not copied.

        Args:
            level: shape of the backbone.
            tensors: tensors by the names of the family's own parameters and buffers. If those of a head are
                all missing, the head becomes a `MissingHead`.

        Returns:
            The backbone.

        Raises:
            ValueError: for names or shapes that are not the level's.
        """
        with torch.device("meta"):  # without memory, which the tensors bring
            module = cls.of_level(level)
        if level.depth is not None:
            module = module.until(level.depth)
        module.reference = level.reference
        for head in cls.heads:
            if not any(name.startswith(f"{head}.") for name in tensors):
                setattr(module, head, MissingHead())
        try:
            module.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"expected the tensors of level {level.name}, got others: {error}") from error
        return module

    @classmethod
    def of_level(cls, level: Level) -> Self:
        """Return a backbone of a level's shape, with fresh weights.

        Raises:
            ValueError: for a family whose shape a level does not tell.
        """
        raise ValueError(f"expected a level that tells a backbone's shape, got one of {level.family}")

    def level(self, name: str) -> Level:
        """Return the level that this backbone is, under a name."""
        return Level(
            name,
            self.num_layers,
            self.embed_dim,
            self.attention_heads,
            self.reference,
            self.family,
            dict(self.facts),
        )

    def forward(
        self, tokens: Tensor, packing: Packing, sink: AttentionSink | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute the final hidden states of the real tokens.

        A family that also gives hidden states of other layers has one more argument, `taken`, with which it
        returns a tuple of what `Taken` asks for; see `Encoder.forward`.

        Args:
            tokens: `(batch, time)` integer ids of the alphabet, or `(batch, time, len(alphabet))`
                distributions over it where the family takes them.
            packing: packing of the tokens that are no padding.
            sink: function that is called with the `(batch, heads, time, time)` attention maps of each layer.

        Returns:
            `(tokens, width)` final hidden states in packed order, in float32 where weights are in a half
            type; `packing.unpack` pads them.
        """
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of layers that are there, fewer than `num_layers` in a backbone that was cut."""
        return self.num_layers

    def until(self, layer: int) -> Self:
        """Return a backbone that ends with a layer, and shares everything up to it; a part has no heads.

        Args:
            layer: number of the layer, from 1 to `depth`.

        Raises:
            ValueError: for a layer that is not there, or a family that gives its last layer alone.
        """
        if not 1 <= layer <= self.depth:
            raise ValueError(f"expected a layer from 1 to {self.depth}, got {layer}")
        return self if layer == self.depth else self._cut(layer)

    def _cut(self, layer: int) -> Self:
        """Return a backbone that ends with a layer before the last; a family that can do so replaces this."""
        raise ValueError(
            f"expected a backbone that gives hidden layers, got one of {self.family}, which gives its last, "
            f"{self.num_layers}, alone: it was asked for layer {layer}"
        )

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Return logits of `(..., width)` final hidden states; None where there is no language-model head."""
        return None

    def contacts(self, ids: Tensor, attentions: Tensor) -> Tensor:
        """Return `(batch, residues, residues)` contact probabilities, where the family has a head for them.

        Args:
            ids: `(batch, time)` token ids.
            attentions: `(batch, layers, heads, time, time)` attention maps.

        Raises:
            RuntimeError: for a family without such a head.
        """
        raise RuntimeError(
            f"expected a backbone with a contact head, got one of {self.family}, which has none"
        )

    def top_modules(self, count: int) -> list[nn.Module]:
        """Return the modules of the top `count` layers, and of what comes after them.

        Raises:
            ValueError: for a family that does not tell its layers.
        """
        raise ValueError(
            f"expected a family whose layers are known, got {self.family}: freeze whole backbones"
        )

    def bytes_beyond(self, time: int) -> int:
        """Return a rough bound of the bytes that a forward pass takes for each token beyond packed layers'.

        Args:
            time: number of tokens in the longest sequence of the batch.
        """
        return 0

    def freeze_heads(self) -> None:
        """Stop the heads from training; a weight that is tied to the embedding still trains."""
        for name in self.heads:
            self.get_submodule(name).requires_grad_(False)

    def tensors(self) -> StateDict:
        """Return all tensors by name, each once."""
        return StateDict(self)

    def embedding_tensors(self) -> StateDict:
        """Return the tensors that embeddings depend on, by name: all but those of the heads."""
        return StateDict(self, lambda name: name.partition(".")[0] not in self.heads)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

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
