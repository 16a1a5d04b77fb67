"""`Convention`: how the files of a family name, pack and describe the tensors of its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from rd_torch.levels import Level

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Convention:
    """How the files of a family name, pack and describe the tensors of its modules.

    Attributes:
        family: name of the family, as its class has it.
        title: name of the family in messages.
        model_type: the model type that transformers' `config.json` states.
        facts: what `config.json` must say besides; a key that is missing is let pass, for the tensors have to
            fit in any case.
        sizes: the published sizes by name.
        marks: expression that is found in the name of some tensor of every file of the family.
        renamed: function of a name in a file and a tensor; it yields the tensors of our modules that it
            holds, by their names: none, one, or the parts of a packed one.
        level_of: function of the tensors' shapes by our names, the content of `config.json` and the place for
            messages; it tells the level, under any name.
        completed: function of the tensors by our names and their level; it returns all that our module has.
    """

    family: str
    title: str
    model_type: str
    facts: Mapping[str, object]
    sizes: Mapping[str, Level]
    marks: re.Pattern[str]
    renamed: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]
    level_of: Callable[[Shapes, Mapping[str, Any], str], Level]
    completed: Callable[[Mapping[str, Tensor], Level], dict[str, Tensor]]

    def check(self, config: Mapping[str, Any], place: str) -> None:
        """Refuse a model whose config says that it is computed in another way.

        What it says of rotary angles may stand in a dictionary of its own, which goes before.

        Args:
            config: the content of `config.json`.
            place: where it lies, for the message.

        Raises:
            ValueError: for the first fact that differs.
        """
        angles = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        stated = {**config, **angles}
        for key, expected in self.facts.items():
            if stated.get(key, expected) != expected:
                raise ValueError(
                    f"expected an {self.title} with {key} {expected!r}, got {stated[key]!r} in {place}"
                )


def own_convention(family: str) -> Convention:
    """Return the convention of a family whose tensors lie in our checkpoints alone, under its own names."""

    def unknown(*_: object) -> Level:
        """Raise a ValueError: only a config of ours tells the level."""
        raise ValueError(
            f"expected a checkpoint of rd_torch, whose config tells the level of a {family}, got none"
        )

    return Convention(
        family=family,
        title=family,
        model_type=family,
        facts={},
        sizes={},
        marks=re.compile("$^"),
        renamed=lambda name, tensor: iter([(name, tensor)]),
        level_of=unknown,
        completed=lambda tensors, level: dict(tensors),
    )


def published_size(sizes: Mapping[str, Level], num_layers: int, width: int) -> Level | None:
    """Return the published size that has so many layers of this width, if there is one."""
    fitting = [size for size in sizes.values() if (size.num_layers, size.width) == (num_layers, width)]
    return fitting[0] if fitting else None
