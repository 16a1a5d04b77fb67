"""Read the checkpoint that a name stands for: one of ours, the authors' maps, or a single backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Final, Unpack

import torch

from rd_torch.choices import check_choice
from rd_torch.config import RDConfig
from rd_torch.levels import TRANSFORMERS_FAMILY, Level, Reference, split_level
from rd_torch.reconstruct import Reconstructor
from rd_torch.weights.backbone import read_backbone, read_level
from rd_torch.weights.files import (
    Files,
    Source,
    find_backbone,
    find_here,
    list_weights,
    looks_like_a_repository,
    shipped_checkpoints,
)
from rd_torch.weights.folder import BACKBONES, CONFIG, MAPS, backbone_file, read_config, read_maps
from rd_torch.weights.hub import Hub, MissingFileError
from rd_torch.weights.known import PUBLISHED_MAPS, reference_to
from rd_torch.weights.published import Choice, PublishedOptions, holds_published_maps, read_published
from rd_torch.weights.reconstruction import reconstructor_in, reconstructor_on
from rd_torch.weights.tensors import Tensors, read_json

DEFAULT_MODEL: Final = "esm2-rd-mini"
"""The family that ships with the package, on which everything runs unless another model is named."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and maps, and the way to its backbones, which are read one at a time.

    Attributes:
        config: levels and choices of the chain.
        maps: by level, the tensors of the stage that leads to it.
        included: by name, a function that finds the files of a backbone which the checkpoint itself holds.
        name: name or path by which the user asked for it.
        reconstructor: what raw embeddings are reconstructed from; None where only the maps are known.
        as_stored: whether included backbones are read in the dtype and shape that the checkpoint states; if
            false, their shape is told from their tensors, and they are read in float32.
    """

    config: RDConfig
    maps: Mapping[str, Tensors]
    included: Mapping[str, Callable[[], Files]]
    name: str = ""
    as_stored: bool = True
    reconstructor: Reconstructor | None = None

    def read_backbone(
        self,
        level: Level,
        source: Source | None,
        hub: Hub,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Level, Tensors]:
        """Read a level's backbone, as far as the layer of the level.

        Args:
            level: the level.
            source: where to take the backbone from; by default from where the checkpoint has it.
            hub: how to reach the Hub.
            dtype: dtype of the weights; by default the stored one in a checkpoint of ours, else float32.
            device: device to put the weights on; by default the CPU.

        Returns:
            The level, with the reference of a backbone that came from the Hub, and the backbone's tensors by
            the names that its family has here.

        Raises:
            FileNotFoundError: if the backbone's files are not there.
            ValueError: for a backbone that cannot be read, or that has another shape than the level.
        """
        stored = self.as_stored and source is None and level.backbone in self.included
        files = self.find_backbone(level, source, hub)
        found = level if stored else _read_fitting(level, files)
        return found, read_backbone(
            files, found, dtype=dtype or (None if stored else torch.float32), device=device
        )

    def find_backbone(self, level: Level, source: Source | None, hub: Hub) -> Files:
        """Find the files of a level's backbone, and download them if need be.

        Args:
            level: the level.
            source: where to take the backbone from; by default from where the checkpoint has it.
            hub: how to reach the Hub.

        Returns:
            The files.

        Raises:
            FileNotFoundError: if the files are not there, as in a checkpoint of maps alone.
            ValueError: for a checksum that differs, or a config of another family.
        """
        if source is None and level.backbone in self.included:
            try:
                return self.included[level.backbone]()
            except MissingFileError as error:
                raise FileNotFoundError(f"{error}; or {self._cure()}") from error
        source = source or level.reference
        if source is None:
            raise FileNotFoundError(
                f"expected a checkpoint with the backbone of level {level.name}, got {self.name} without it: "
                + self._cure()
            )
        return find_backbone(source, hub, level.name)

    def _cure(self) -> str:
        """Say what to do with a checkpoint that holds maps and no backbones."""
        missing = dict.fromkeys(each.backbone for each in self.config.levels if each.reference is None)
        needed = ", ".join(f"{name!r}: ..." for name in missing)
        return (
            f"give backbones by RDModel.from_pretrained({self.name!r}, backbones={{{needed}}}), or nest "
            "embeddings that you have with rd-torch combine"
        )


def _read_fitting(level: Level, files: Files) -> Level:
    """Read the level of a backbone from elsewhere; raise a ValueError unless it has the given one's shape."""
    if level.num_layers is None:
        found = replace(read_level(files), name=level.name)
        fits = found.width == level.width
    else:
        found = read_level(files, level.name)
        fits = replace(found, reference=None) == replace(level, reference=None)
    if not fits:
        raise ValueError(f"expected a backbone of shape {level}, got {found} in {files.place}")
    return found


def read_checkpoint(
    name_or_folder: str | Path,
    level: str | None = None,
    hub: Hub | None = None,
    revision: str | None = None,
    **published: Unpack[PublishedOptions],
) -> Checkpoint:
    """Read a checkpoint up to a level: its config and its maps, but not yet its backbones.

    Args:
        name_or_folder: a checkpoint of ours, as a folder, the name of a shipped one or a Hub id; the authors'
            maps, as a Hub id or a folder that holds their `weights/`; or one backbone, which becomes a chain
            of one level, as a file, a folder or a Hub id.
        level: name of the level at which the chain ends; by default the last. The authors' maps need one.
        hub: how to reach the Hub.
        revision: commit, tag or branch of a Hub id.
        **published: which of the authors' maps to read, as `PublishedOptions` says.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for files that cannot be read, unknown levels or options, or options of the authors' maps
            for anything else.
    """
    hub = hub or Hub()
    unknown = set(published) - PublishedOptions.__annotations__.keys()
    if unknown:
        raise ValueError(
            f"expected options among {', '.join(PublishedOptions.__annotations__)}, got "
            + ", ".join(map(repr, sorted(unknown)))
        )
    path = find_here(name_or_folder)
    if str(name_or_folder) == PUBLISHED_MAPS or (path.is_dir() and holds_published_maps(path)):
        folder = path if path.is_dir() else None
        return Checkpoint(*read_published(folder, level, Choice(**published), hub, revision), {})
    if published:
        raise ValueError(
            f"expected options of the authors' maps ({', '.join(published)}) with those maps alone, got "
            f"{name_or_folder}"
        )
    if path.is_dir() and not list_weights(path):
        checkpoint = _read_own(str(name_or_folder), lambda name: path / name, lambda name: path / name, level)
        checkpoint = replace(checkpoint, reconstructor=reconstructor_in(path, checkpoint.config.widths))
        has_backbones = any(find().paths[0].exists() for find in checkpoint.included.values())
        return checkpoint if has_backbones else replace(checkpoint, included={})
    if not path.exists():
        reference = _reference(name_or_folder, revision)
        pinned = _pin_own(reference, hub)
        if pinned:
            checkpoint = _read_own(
                str(name_or_folder),
                lambda name: hub.fetch(pinned, name).path,
                partial(hub.fetch_folder, pinned),
                level,
            )
            return replace(checkpoint, reconstructor=reconstructor_on(hub, pinned, checkpoint.config.widths))
    files = find_backbone(path if path.exists() else reference, hub)
    config = RDConfig((read_level(files),), (), ())
    config = until_level(config, level)
    return Checkpoint(config, {}, {config.levels[0].backbone: lambda: files}, as_stored=False)


def until_level(config: RDConfig, level: str | None) -> RDConfig:
    """Return the config of the chain that ends at a level.

    Args:
        config: the config of the whole chain.
        level: name of the level; None for the whole chain. No map leads to the first level, so that any layer
            of its backbone that is there may be named, as `"8M@4"`.

    Raises:
        ValueError: for another level.
    """
    if level is None:
        return config
    first, (backbone, layer) = config.levels[0], split_level(level)
    if layer is not None and backbone == first.backbone and layer < (first.layer or inf):
        return _at_layer(config.until(first.name), level)
    return config.until(level)


def _at_layer(config: RDConfig, level: str) -> RDConfig:
    """Return the config of a chain of one level that is taken at another layer of the same backbone."""
    (only,) = config.levels
    if config.has_basis:
        raise ValueError(
            f"expected level {only.name}, whose features the chain scales, centres or rotates, got {level}: "
            "fit a chain of that layer"
        )
    return replace(config, levels=(replace(only, name=level),))


def at_layers(config: RDConfig, layers: Mapping[str, int]) -> RDConfig:
    """Return the config of a chain whose levels are taken at certain layers.

    Args:
        config: the config of the chain.
        layers: by backbone, the layer of its level: any layer in a chain of one backbone, and otherwise the
            layer to which its maps were fitted.

    Raises:
        ValueError: for a backbone that is not there, or another layer.
    """
    for backbone, layer in layers.items():
        mine = [level for level in config.levels if level.backbone == backbone]
        if not mine:
            check_choice("backbone", backbone, tuple(level.backbone for level in config.levels))
        if len(config.levels) == 1 and mine[0].depth != layer:
            config = _at_layer(config, f"{backbone}@{layer}")
        elif all(level.depth != layer for level in mine):
            raise ValueError(
                f"expected a layer of {backbone} that the maps of the chain were fitted to, "
                f"{', '.join(str(level.depth) for level in mine)}, got {layer}: fit maps by rd_torch.fit"
            )
    return config


def _reference(name_or_folder: str | Path, revision: str | None) -> Reference:
    """Return the Hub reference that a name stands for; raise a FileNotFoundError if it cannot be one."""
    name = str(name_or_folder)
    if isinstance(name_or_folder, Path) or not looks_like_a_repository(name):
        raise FileNotFoundError(
            "expected a checkpoint's folder, the name of a shipped checkpoint "
            f"({', '.join(shipped_checkpoints())}) or a Hub id, got {name!r}"
        )
    return reference_to(name, revision)


def _pin_own(reference: Reference, hub: Hub) -> Reference | None:
    """Return a checkpoint of ours at one commit, of which all its files must be; None for anything else."""
    try:
        config = hub.fetch(reference, CONFIG)
    except MissingFileError:
        return None  # the search for a backbone, which follows, says what is missing
    return replace(reference, revision=config.commit) if "format" in read_json(config.path) else None


def _read_own(
    name: str, fetch: Callable[[str], Path], fetch_folder: Callable[[str], Path], level: str | None
) -> Checkpoint:
    """Read a checkpoint of ours that the user called `name`, by functions that find its files and folders."""
    config = read_config(fetch(CONFIG))
    config = until_level(config, level)

    def find(each: Level) -> Files:
        """Find the file of a level's backbone, or the folder of one that transformers reads."""
        if each.family == TRANSFORMERS_FAMILY:
            folder = fetch_folder(f"{BACKBONES}/{each.backbone}")
            return Files(str(folder), (folder,), family=each.family)
        file = fetch(backbone_file(each.backbone))
        return Files(str(file), (file,), family=each.family)

    own = [each for each in config.levels if each.reference is None and each.num_layers is not None]
    included = {each.backbone: partial(find, each) for each in own}
    return Checkpoint(config, read_maps(fetch(MAPS), config), included, name)
