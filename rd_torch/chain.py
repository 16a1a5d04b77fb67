"""`Chain`: the module that owns backbones and stages; it knows what they are, and computes no embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn

from rd_torch.alphabet import Alphabet
from rd_torch.backbone import Backbone, as_family, at_least_float32, one_alphabet
from rd_torch.choices import Method, PredictFrom, SpecialRows
from rd_torch.config import RDConfig
from rd_torch.levels import ALPHABET, split_level
from rd_torch.maps import Maps, basis_in
from rd_torch.modules import Modules, StateDict, modules_of
from rd_torch.nesting import fingerprint
from rd_torch.reconstruct import Reconstructor
from rd_torch.stage import map_shapes

Fact = TypeVar("Fact")


class OfAlphabet(Generic[Fact]):
    """A fact of a chain's alphabet, as an attribute; asked of the class, it is ESM-2's.

    Args:
        read: function that reads the fact off an alphabet.
    """

    def __init__(self, read: Callable[[Alphabet], Fact]) -> None:
        self._read = read

    def __get__(self, chain: Chain | None, _: type) -> Fact:
        """Return the fact."""
        return self._read(ALPHABET if chain is None else next(iter(chain.family().values())).alphabet)


class Chain(nn.Module):
    """Backbones and stages as one module that can be cut, frozen and told from others.

    `RDModel` adds the computation of embeddings; it has the same arguments, and describes them.

    Attributes:
        config: levels and choices of the chain.
        backbones: backbones by name, smallest first. That is the name of the level, without `@` and the
            number of a layer; levels of several layers of one backbone share it.
        stages: stages by the level that each leads to; the basis by the first level, if there is one.
        reconstructor: what raw embeddings are reconstructed from; None where only the maps are known.
        alphabet: the alphabet of the token ids, which all backbones have.
        alphabet_size: number of its tokens.
        padding_idx: id of the token that fills shorter sequences up.
        mask_idx: id of the token that stands for a masked residue.
        cls_idx: id of the token before a sequence.
        eos_idx: id of the token after a sequence.
        prepend_bos: whether a token stands before a sequence.
        append_eos: whether a token stands after a sequence.
    """

    alphabet = OfAlphabet(lambda alphabet: alphabet)
    alphabet_size = OfAlphabet(len)
    padding_idx = OfAlphabet(lambda alphabet: alphabet.padding_idx)
    mask_idx = OfAlphabet(lambda alphabet: alphabet.mask_idx)
    cls_idx = OfAlphabet(lambda alphabet: alphabet.cls_idx)
    eos_idx = OfAlphabet(lambda alphabet: alphabet.eos_idx)
    prepend_bos = OfAlphabet(lambda alphabet: alphabet.prepend_bos)
    append_eos = OfAlphabet(lambda alphabet: alphabet.append_eos)

    config: RDConfig
    backbones: Modules[Backbone]
    stages: Modules[Maps]
    reconstructor: Reconstructor | None = None

    def __init__(
        self,
        backbones: Mapping[str, nn.Module],
        stages: Sequence[Maps],
        *,
        predict_from: PredictFrom = "nested",
        special_rows: SpecialRows = "maps",
        final_norm: bool = True,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        family = as_family(backbones)
        if family:
            one_alphabet(family)
        for backbone in family.values():
            backbone.freeze_heads()
        widths = [backbone.embed_dim for backbone in family.values()][:1]
        basis = basis_in(stages)
        steps = stages[1:] if basis else stages
        for stage in steps:
            widths.append(stage.width_after(widths[-1]))
        self.config = RDConfig(
            levels=tuple(each.level(name) for name, each in family.items()),
            added=tuple(after - before for before, after in pairwise(widths)),
            explained=tuple(stage.explained for stage in steps),
            predict_from=predict_from,
            special_rows=special_rows,
            final_norm=final_norm,
            provenance=dict(provenance or {}),
            method=_method_of(stages),
            **(basis.facts if basis else {}),
        )
        for (name, expected), stage in zip(map_shapes(self.config).items(), stages, strict=True):
            got = {part: tuple(tensor.shape) for part, tensor in stage.named_buffers()}
            if got != expected:
                raise ValueError(
                    f"expected tensors of shapes {expected} in the stage that leads to {name}, got {got}"
                )
        dtype = at_least_float32(next(iter(family.values())).dtype)
        self.backbones = modules_of({split_level(name)[0]: each for name, each in family.items()})
        self.stages = modules_of(
            {  # a copy where dtypes differ, because `.to` would change the caller's own stage
                level.name: stage if stage.dtype == dtype else copy.deepcopy(stage).to(dtype)
                for level, stage in zip(self.config.levels[0 if basis else 1 :], stages, strict=True)
            }
        )

    @classmethod
    def of(cls, config: RDConfig, backbones: Mapping[str, nn.Module], stages: Sequence[Maps]) -> Self:
        """Make a chain of parts, with the choices of a config.

        Args:
            config: config that says what stages predict from, what stands in special rows, whether the final
                norm acts on hidden layers, and where the parts come from; levels and widths are those of the
                parts.
            backbones: backbones by level, smallest first.
            stages: stages, one fewer than backbones; before them the basis, if there is one.

        Returns:
            The chain.
        """
        return cls(
            backbones,
            stages,
            predict_from=config.predict_from,
            special_rows=config.special_rows,
            final_norm=config.final_norm,
            provenance=config.provenance,
        )

    @property
    def embed_dim(self) -> int:
        """Width of the whole nested embedding."""
        return self.config.widths[self.config.levels[-1].name]

    @property
    def dtype(self) -> torch.dtype:
        """The backbones' dtype."""
        return next(iter(self.family().values())).dtype

    @property
    def device(self) -> torch.device:
        """Device that token ids must be on."""
        return next(iter(self.family().values())).device

    @property
    def num_layers(self) -> int:
        """Number of layers of the largest backbone, also where no level needs the last ones."""
        return self.config.levels[-1].shape[0]

    @property
    def attention_heads(self) -> int:
        """Number of attention heads in each layer of the largest backbone."""
        return self.config.levels[-1].shape[2]

    def truncate(self, level: str) -> Self:
        """Cut the chain behind a level.

        Args:
            level: name of the level that becomes the last.

        Returns:
            A chain of the same modules up to that level, without copies.

        Raises:
            ValueError: for a level that the chain does not have.
        """
        self.config.require_level(level)
        names = list(self.config.widths)
        run = names[: names.index(level) + 1]
        family = self.family()
        backbones = {name: family[name] for name in run}
        cut = self.of(self.config, backbones, [self.stages[name] for name in run if name in self.stages])
        cut.reconstructor = self.reconstructor
        return cut.train(self.training)

    def family(self, width: int | None = None) -> dict[str, Backbone]:
        """Return the backbones that run for a number of features, by level, smallest first.

        Levels of several layers of one backbone have the same object.

        Args:
            width: number of features, by default all.

        Raises:
            ValueError: for a width that does not exist.
        """
        return {name: self.backbones[split_level(name)[0]] for name in self.config.levels_for(width)}

    def fingerprint(self, level: str | None = None) -> str:
        """Return a digest of all that embeddings depend on: shapes, choices, numbers of backbones and maps.

        Two chains with the same fingerprint are the same in the same dtype, wherever they come from.

        Args:
            level: name of a level, to have the fingerprint of the chain cut behind it; None for the whole.
        """
        config = self.config if level is None else self.config.until(level)
        run = {split_level(name)[0] for name in config.widths}
        backbones = {
            f"backbones.{name}.": each.embedding_tensors()
            for name, each in self.backbones.items()
            if name in run
        }
        stages = modules_of({name: self.stages[name] for name in config.widths if name in self.stages})
        return fingerprint(config, backbones | {"stages.": StateDict(stages)})

    def freeze_backbones(self, *levels: str, except_top: int = 0) -> Self:
        """Stop backbones from training; the maps are frozen already.

        Frozen layers run as in inference and keep no activations, unless something below them trains.

        Args:
            *levels: names of backbones, or of levels whose backbones are frozen; by default all.
            except_top: number of top layers in each backbone that stay as they are, and with them the last
                LayerNorm.

        Returns:
            This same model.

        Raises:
            ValueError: for a level that the chain does not have, or more top layers than a backbone has.
        """
        for name in levels or self.backbones:
            if name not in self.backbones:
                self.config.require_level(name)
            backbone = self.backbones[split_level(name)[0]]
            if not 0 <= except_top <= backbone.depth:
                raise ValueError(
                    f"expected except_top from 0 to {backbone.depth}, the layers of level {name}, "
                    f"got {except_top}: name the levels that have more"
                )
            kept = backbone.top_modules(except_top) if except_top else []
            left = {id(parameter) for module in kept for parameter in module.parameters()}
            for parameter in backbone.parameters():
                if id(parameter) not in left:
                    parameter.requires_grad_(False)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Save memory in training: keep what goes from layer to layer, and compute the rest again.

        Args:
            gradient_checkpointing_kwargs: None or `{"use_reentrant": False}`. There is no other way here,
                because the reentrant one loses gradients where the first input has none.

        Raises:
            ValueError: for other options.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options not in ({}, {"use_reentrant": False}):
            raise ValueError(f"expected no options but {{'use_reentrant': False}}, got {options}")
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any backbone computes its layers again in the backward pass."""
        return any(backbone.checkpointing for backbone in self.backbones.values())

    def _set_checkpointing(self, on: bool) -> None:
        for backbone in self.backbones.values():
            backbone.checkpointing = on


def _method_of(stages: Sequence[Maps]) -> Method:
    """Return the method that the stages belong to; reverse distillation where there are no stages."""
    methods = {stage.method for stage in stages}
    if len(methods) > 1:
        raise ValueError("expected stages of one kind, got some of `Stage` and some of `ConcatPCA`")
    return methods.pop() if methods else "rd"
