"""Names of layers, and what each of them costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rd_torch.backbone import Backbone, Encoder
from rd_torch.levels import split_level

Widths = Mapping[str, int]
"""Widths of raw embeddings by the names of their layers, such as `28K@2`, smallest backbone first."""


def stated(name: str, backbone: Backbone) -> str:
    """Return the name of a layer with its number, which names of last layers leave out."""
    level, number = split_level(name)
    return f"{level}@{number or backbone.num_layers}"


def level_of(layer: str) -> str:
    """Return the level that a layer such as `28K@2` belongs to."""
    return split_level(layer)[0]


def number_of(layer: str) -> int:
    """Return the number of a layer such as `28K@2`, counted from 1."""
    _, number = split_level(layer)
    if number is None:
        raise ValueError(f"expected a layer with its number, as 28K@2, got {layer}")
    return number


def layers_by_level(layers: Iterable[str]) -> dict[str, list[str]]:
    """Return the layers of each level, in their order."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(level_of(layer), []).append(layer)
    return found


def last_layers(layers: Iterable[str]) -> list[str]:
    """Return the last layer of each level."""
    return [each[-1] for each in layers_by_level(layers).values()]


def spread(layers: int, most: int) -> list[int]:
    """Return the numbers of some layers at equal distances, the last among them.

    Args:
        layers: Number of layers of a backbone.
        most: Number of them to take at the most.
    """
    count = min(layers, most)
    return [round(layers * (k + 1) / count) for k in range(count)]


def costs_of(family: Mapping[str, Backbone]) -> dict[str, int]:
    """Return the number of parameters that run for each token up to a layer of its backbone, by layer.

    Those of the layers count; tables of embeddings are looked up, and heads do not run.

    Args:
        family: The backbone of each layer, by the layer's name.

    Raises:
        SystemExit: For a backbone whose layers are not known.
    """
    costs: dict[str, int] = {}
    for name, backbone in family.items():
        if not isinstance(backbone, Encoder):
            raise SystemExit(f"expected backbones whose layers are known, got {backbone.family} at {name}")
        layers = list(backbone.layers)[: number_of(name)]
        costs[name] = sum(part.numel() for layer in layers for part in layer.parameters())
    return costs
