"""`FAMILIES`: the families of backbones by name, and what becomes of any module that is to be one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import nn

from rd_torch.alphabet import Alphabet
from rd_torch.backbone.automodel import TransformersBackbone
from rd_torch.backbone.backbone import Backbone
from rd_torch.backbone.esm2 import ESM2
from rd_torch.backbone.esmc import ESMC
from rd_torch.backbone.tokens import find_difference
from rd_torch.levels import Level, split_level

FAMILIES: Final[dict[str, type[Backbone]]] = {
    kind.family: kind for kind in (ESM2, ESMC, TransformersBackbone)
}
"""The families that checkpoints can name, each a class of its own file. Other packages may add to it."""


def class_of(level: Level) -> type[Backbone]:
    """Return the class of the family that a level states.

    Raises:
        ValueError: for a family that is not among `FAMILIES`.
    """
    if level.family not in FAMILIES:
        raise ValueError(
            f"expected a level of a family among {', '.join(FAMILIES)}, got {level.family} at level "
            f"{level.name}: import the package that adds this family, or a newer version of rd_torch"
        )
    return FAMILIES[level.family]


def as_backbone(module: nn.Module) -> Backbone:
    """Return a backbone: the module itself if it is one, or one that shares the tensors of an `esm.ESM2`.

    Args:
        module: the module.

    Raises:
        TypeError: for a module that is neither.
    """
    if isinstance(module, Backbone):
        return module
    try:
        return ESM2.sharing(module)
    except TypeError as error:
        raise TypeError(f"{error}: rd_torch.TransformersBackbone takes a model of transformers'") from error


def as_family(backbones: Mapping[str, nn.Module]) -> dict[str, Backbone]:
    """Return the backbone of each level, cut behind the last layer that a level takes from it.

    Args:
        backbones: modules by level, smallest first, as `as_backbone` takes them. Levels of several layers of
            one backbone have the same module.

    Raises:
        TypeError: for a module that is no backbone.
        ValueError: for a layer that a backbone does not have or is named twice, or two modules for one name.
    """
    modules: dict[str, nn.Module] = {}
    layers: dict[str, dict[str, int | None]] = {}
    for name, module in backbones.items():
        backbone, layer = split_level(name)
        if modules.setdefault(backbone, module) is not module:
            raise ValueError(f"expected one module for all levels of {backbone}, got another for {name}")
        layers.setdefault(backbone, {})[name] = layer
    cut = {name: _cut(as_backbone(module), layers[name]) for name, module in modules.items()}
    return {name: cut[split_level(name)[0]] for name in backbones}


def _cut(backbone: Backbone, levels: Mapping[str, int | None]) -> Backbone:
    """Return a backbone cut behind the last layer that levels take, given by their names."""
    last = backbone.num_layers
    taken: dict[int, str] = {}
    for name, stated in levels.items():
        layer = last if stated is None else stated
        if layer > backbone.depth:
            cut = "" if backbone.depth == last else f", the first of {last}"
            raise ValueError(
                f"expected a backbone that reaches layer {layer}, which level {name} takes, got one of "
                f"{backbone.depth} layers{cut}"
            )
        if layer in taken:
            raise ValueError(f"expected each layer once, got layer {layer} as {taken[layer]} and {name}")
        taken[layer] = name
    return backbone.until(max(taken))


def one_alphabet(family: Mapping[str, Backbone]) -> Alphabet:
    """Return the alphabet that all backbones of a family have.

    Args:
        family: backbones by level.

    Raises:
        ValueError: for backbones that turn a sequence into different tokens, with that sequence.
    """
    (name, first), *others = family.items()
    for other_name, other in others:
        sequence = find_difference(first.alphabet, other.alphabet)
        if sequence is not None:
            raise ValueError(
                f"expected backbones of one alphabet, got others: {sequence!r} is "
                f"{_spell(first.alphabet, sequence)} for level {name} ({first.family}) and "
                f"{_spell(other.alphabet, sequence)} for level {other_name} ({other.family}); embed with "
                "each alone, and chain their embeddings by rd_torch.fit_stores or rd-torch fit --from-stores"
            )
    return first.alphabet


def _spell(alphabet: Alphabet, sequence: str) -> str:
    """Return the token ids of a sequence as text."""
    try:
        ids = alphabet.ids_of(sequence)
    except KeyError:
        return "no sequence of tokens"
    return f"the {len(ids)} tokens {' '.join(map(str, ids))}"
