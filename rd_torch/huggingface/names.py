"""The linear layers inside a layer, under the names that transformers' `EsmLayer` has for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from torch import nn

from rd_torch.backbone import TransformerLayer

LAYER: Final = {
    "attention.self": ("self_attn", {"query": "q_proj", "key": "k_proj", "value": "v_proj"}),
    "attention.output": ("self_attn", {"dense": "out_proj"}),
    "intermediate": ("", {"dense": "fc1"}),
    "output": ("", {"dense": "fc2"}),
}
"""For each module in a layer of transformers': ours, and our names of its children."""

_RENAMED: Final = re.compile(rf"(.*\blayers\.\d+)\.({'|'.join(map(re.escape, LAYER))})(?:\.(\w+))?")


class Renamed(nn.Module):
    """A view of a module whose children have other names; a child that is replaced here is replaced there."""

    def __init__(self, owner: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self.__dict__.update(owner=owner, names=names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, self.names.get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if "owner" in self.__dict__:
            setattr(self.owner, self.names.get(name, name), value)
        else:
            super().__setattr__(name, value)


class NamedTwice:
    """A mixin for modules whose linear layers are found under two names each.

    One name is fair-esm's, `layers.0.self_attn.q_proj`, and the other is transformers',
    `layers.0.attention.self.query`. Whoever lists the modules or asks for one by name, as PEFT does to put
    its adapters in, finds both. State dicts and parameters have fair-esm's names alone.
    """

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """List modules by name, and linear layers by both names.

        PyTorch itself passes arguments, to list parameters and buffers: then each module has one name alone.

        Args:
            *arguments: arguments of `torch.nn.Module.named_modules`.
            **options: likewise.

        Yields:
            Pairs of name and module.
        """
        for name, module in cast(Any, super()).named_modules(*arguments, **options):
            yield name, module
            if not arguments and not options and isinstance(module, TransformerLayer):
                for theirs, (ours, names) in LAYER.items():
                    owner = module.get_submodule(ours)
                    yield from ((f"{name}.{theirs}.{new}", getattr(owner, old)) for new, old in names.items())

    def modules(self) -> Iterator[nn.Module]:
        """Return every module once."""
        return (module for _, module in cast(Any, super()).named_modules())

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module that has a name of either kind."""
        match = _RENAMED.fullmatch(target)
        if match is None:
            return cast(nn.Module, cast(Any, super()).get_submodule(target))
        layer, theirs, leaf = match.groups()
        ours, names = LAYER[theirs]
        owner = cast(Any, super()).get_submodule(f"{layer}.{ours}".rstrip("."))
        return Renamed(owner, names) if leaf is None else getattr(owner, names.get(leaf, leaf))
