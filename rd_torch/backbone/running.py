"""Run the backbones of a chain, each once, whichever of its layers the levels take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from rd_torch.backbone.backbone import Backbone, Taken
from rd_torch.backbone.layer import AttentionSink
from rd_torch.backbone.packing import Packing
from rd_torch.levels import split_level

Kind = TypeVar("Kind", bound=Backbone)


def runs_of(family: Mapping[str, Kind], *, final_norm: bool = True) -> list[tuple[Kind, Taken, list[str]]]:
    """Return what has to run for some levels.

    Args:
        family: the backbone of each level; levels of one backbone have the same object.
        final_norm: whether a backbone's last LayerNorm acts on layers before the last.

    Returns:
        Each backbone once, what is taken from it, and the names of the levels that take it, in that order.
    """
    runs: dict[int, tuple[Kind, dict[int, str]]] = {}
    for name, backbone in family.items():
        _, names = runs.setdefault(id(backbone), (backbone, {}))
        layer = split_level(name)[1]
        names[backbone.num_layers if layer is None else layer] = name
    return [
        (backbone, Taken(tuple(sorted(names)), final_norm), [names[layer] for layer in sorted(names)])
        for backbone, names in runs.values()
    ]


def run_backbones(
    family: Mapping[str, Backbone],
    tokens: Tensor,
    packing: Packing,
    sink: AttentionSink | None = None,
    *,
    final_norm: bool = True,
) -> dict[str, Tensor]:
    """Run backbones, each once, and no layer that no level needs.

    Args:
        family: the backbone of each level, smallest first, as for `runs_of`.
        tokens: `(batch, time)` ids, or distributions where all families take them.
        packing: packing of the tokens that are no padding.
        sink: function that is called with the attention maps of the largest backbone.
        final_norm: whether a backbone's last LayerNorm acts on layers before the last.

    Returns:
        `(tokens, width)` packed raw embeddings by level, in the order of the family.
    """
    *_, largest = family.values()
    raw: dict[str, Tensor] = {}
    for backbone, taken, names in runs_of(family, final_norm=final_norm):
        its_sink = sink if backbone is largest else None
        if taken.layers == (backbone.num_layers,):  # which every family can do
            raw[names[0]] = backbone(tokens, packing, its_sink)
        else:
            raw |= zip(names, backbone(tokens, packing, its_sink, taken=taken), strict=True)
    return {name: raw[name] for name in family}
