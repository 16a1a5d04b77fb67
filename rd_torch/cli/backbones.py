"""Which backbones a command takes, and how they are loaded, here or on the machines of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rd_torch.cli.fitting_stores import choose_levels
from rd_torch.cli.shared import absolute_name, find_device, load_model, split_by_level

if TYPE_CHECKING:
    from rd_torch.config import RDConfig
    from rd_torch.weights import Source


class BackboneChoice(NamedTuple):
    """The backbones that the options of a command name. It can be sent to other machines.

    Attributes:
        levels: names of the levels, smallest first.
        sources: by level or by name, where the backbone is; empty where one checkpoint has all of them.
        checkpoint: name of the checkpoint that has all of them.
        config: the config of that checkpoint; None where `sources` says where the backbones are.
        trusted: names of models whose files may bring Python code that is run.
    """

    levels: list[str]
    sources: dict[str, Source]
    checkpoint: str
    config: RDConfig | None
    trusted: tuple[str, ...]

    def load(self, device: str | None) -> dict[str, Any]:
        """Load the backbones by level, in float32.

        Args:
            device: name of the device to load them onto; by default the best that there is.
        """
        from rd_torch.fitting import load_backbones
        from rd_torch.weights import Hub

        if self.config is None:
            sources = {name: self.sources.get(name) or self.sources[_backbone(name)] for name in self.levels}
            return load_backbones(sources, find_device(device), Hub(trusted=self.trusted))
        wanted = set(map(_backbone, self.levels))
        last = next(name for name in reversed(self.config.widths) if _backbone(name) in wanted)
        model = load_model(self.checkpoint, last, "float32", device, trust_remote_code=self.trusted)
        return {name: model.backbones[_backbone(name)] for name in self.levels}

    def origin(self) -> dict[str, Any]:
        """Say where the backbones come from, for the record of a fit."""
        if self.config is not None:
            return dict(self.config.provenance)
        return {name: getattr(source, "repo", str(source)) for name, source in self.sources.items()}


def _backbone(level: str) -> str:
    """Return the name of a level's backbone."""
    from rd_torch.levels import split_level

    return split_level(level)[0]


def choose_backbones(
    backbones: str | None, pairs: tuple[str, ...], levels: str | None, trusted: tuple[str, ...]
) -> BackboneChoice:
    """Settle which backbones are taken.

    Args:
        backbones: a checkpoint; or the name of a family, whose published sizes are on the Hub.
        pairs: texts such as `"8M=esm2.pt"`, in place of `backbones`.
        levels: names of levels to take, with commas between them; by default all.
        trusted: names of models whose files may bring Python code that is run.

    Returns:
        The choice.

    Raises:
        ValueError: if both a checkpoint and sources were given, for one model in place of a checkpoint, and
            for a level that is not there.
    """
    from rd_torch.loading import is_foreign
    from rd_torch.weights import DEFAULT_MODEL, ON_HUB, read_checkpoint

    trusted = tuple(map(absolute_name, trusted))  # machines of a cluster work in other folders
    if pairs and backbones:
        raise ValueError("expected --backbones or --backbone, got both")
    if pairs:
        sources = {level: absolute_name(source) for level, source in split_by_level(pairs).items()}
        return BackboneChoice(choose_levels(levels, sources), dict(sources), "", None, trusted)
    if backbones is not None and backbones in ON_HUB:
        published = ON_HUB[backbones]
        chosen = choose_levels(levels, published)
        return BackboneChoice(
            chosen, {name: published[name] for name in map(_backbone, chosen)}, "", None, trusted
        )
    if backbones is not None and is_foreign(backbones):
        raise ValueError(
            f"expected a checkpoint or the name of a family as --backbones, got {backbones!r}: name the "
            f"model of each level by --backbone LEVEL={backbones}"
        )
    name = absolute_name(backbones or DEFAULT_MODEL)
    config = read_checkpoint(name).config
    return BackboneChoice(choose_levels(levels, config.widths), {}, name, config, trusted)


def parse_layers(text: str | None) -> Any:
    """Return the layers that `--layers` gives.

    Args:
        text: `"all"`; numbers with commas between them, for every backbone; or names as `650M@24,650M@25`.

    Returns:
        `"all"`, a list of numbers, a dictionary of lists by backbone, or None.

    Raises:
        ValueError: for anything else.
    """
    from rd_torch.levels import split_level

    if text is None or text == "all":
        return text
    parts = text.split(",")
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    layers: dict[str, list[int]] = {}
    for part in parts:
        backbone, layer = split_level(part)
        if layer is None:
            raise ValueError(f"expected --layers as all, 24,25 or 650M@24,650M@25, got {text!r}")
        layers.setdefault(backbone, []).append(layer)
    return layers
