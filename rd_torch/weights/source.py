"""From a name to a checkpoint, whatever lies there: ours, the authors' maps, a backbone of ESM-2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Unpack

import torch

from rd_torch.config import Level, RDConfig, Reference
from rd_torch.weights.backbone import (
    Files,
    Source,
    find_backbone,
    list_weights,
    looks_like_a_repository,
    read_backbone,
    read_level,
)
from rd_torch.weights.folder import CONFIG, MAPS, backbone_file, read_config, read_maps
from rd_torch.weights.hub import Hub, MissingFileError
from rd_torch.weights.known import PUBLISHED_MAPS, reference_to
from rd_torch.weights.published import Choice, PublishedOptions, holds_published_maps, read_published
from rd_torch.weights.tensors import Tensors, read_json

DEFAULT_MODEL: Final = "esm2-rd-mini"
"""The shipped family that everything runs on unless another is named."""

_PACKAGE: Final = Path(__file__).parents[1]
_SHELVES: Final = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; its backbones are found and read one at a time.

    Attributes:
        config: its levels and facts.
        maps: by level, the tensors of the stage that leads to it.
        included: by level, what finds the files of a backbone that the checkpoint holds itself.
        as_stored: whether those come in the dtype that they are stored in, or in float32.
    """

    config: RDConfig
    maps: Mapping[str, Tensors]
    included: Mapping[str, Callable[[], Files]]
    as_stored: bool = True

    def backbone(
        self,
        level: Level,
        source: Source | None,
        hub: Hub,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Level, Tensors]:
        """A level and its backbone's tensors, from `source` or from where the checkpoint has it.

        Weights come in `dtype`; without one, in a checkpoint of ours as stored, others in float32.

        Raises:
            FileNotFoundError: where nothing is.
            ValueError: for a backbone that does not read or is of another shape.
        """
        stored = self.as_stored and source is None and level.name in self.included
        files = self.find(level, source, hub)
        found = level if stored else read_level(files, level.name)
        if replace(found, reference=None) != replace(level, reference=None):
            raise ValueError(f"expected a backbone of shape {level}, got {found} in {files.place}")
        return found, read_backbone(
            files, found, dtype=dtype or (None if stored else torch.float32), device=device
        )

    def find(self, level: Level, source: Source | None, hub: Hub) -> Files:
        """The files of a level's backbone, downloaded if need be.

        Raises:
            FileNotFoundError: where nothing is.
            ValueError: for a checksum or a config that is not ESM-2's.
        """
        if source is None and level.name in self.included:
            return self.included[level.name]()
        source = source or level.reference
        assert source is not None, "a level is included or has a reference"
        return find_backbone(source, hub, level.name)


def shipped() -> dict[str, Path]:
    """Checkpoints that come with the package, by name: inside it, or beside it in a source tree."""
    return {
        config.parent.name: config.parent
        for shelf in _SHELVES
        for config in sorted(shelf.glob("*/config.json"))
    }


def read_checkpoint(
    name_or_folder: str | Path,
    level: str | None = None,
    hub: Hub | None = None,
    revision: str | None = None,
    **published: Unpack[PublishedOptions],
) -> Checkpoint:
    """The checkpoint of that name up to `level`: no maps above it are read, and no backbones yet.

    Args:
        name_or_folder: our checkpoint as folder, shipped name or Hub id; the authors' maps as Hub id or
            a folder that holds their `weights/`; or one backbone, a chain of one level, as file,
            folder or Hub id.
        level: the level to end at; the authors' maps need one.
        hub: how to reach the Hub.
        revision: of a Hub id: commit, tag or branch.
        **published: which of the authors' maps.

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: for files that do not read, unknown levels or options, or options of the authors'
            maps for anything else.
    """
    hub = hub or Hub()
    unknown = set(published) - PublishedOptions.__annotations__.keys()
    if unknown:
        raise ValueError(
            f"expected no option {', '.join(map(repr, sorted(unknown)))}, got it; known: "
            + ", ".join(PublishedOptions.__annotations__)
        )
    path = Path(name_or_folder)
    path = path if path.exists() else shipped().get(str(name_or_folder), path)
    if str(name_or_folder) == PUBLISHED_MAPS or (path.is_dir() and holds_published_maps(path)):
        folder = path if path.is_dir() else None
        return Checkpoint(*read_published(folder, level, Choice(**published), hub, revision), {})
    if published:
        raise ValueError(f"expected {', '.join(published)} only with the authors' maps, got {name_or_folder}")
    if path.is_dir() and not list_weights(path):
        return _read_ours(lambda name: path / name, level)
    if not path.exists():
        reference = _reference(name_or_folder, revision)
        one_commit = _our_commit(reference, hub)
        if one_commit:
            return _read_ours(lambda name: hub.fetch(one_commit, name).path, level)
    files = find_backbone(path if path.exists() else reference, hub)
    config = RDConfig((read_level(files),), (), ())
    config = config if level is None else config.until(level)
    return Checkpoint(config, {}, {config.levels[0].name: lambda: files}, as_stored=False)


def _reference(name_or_folder: str | Path, revision: str | None) -> Reference:
    """The Hub reference that a name means.

    Raises:
        FileNotFoundError: for a name that cannot be one.
    """
    name = str(name_or_folder)
    if isinstance(name_or_folder, Path) or not looks_like_a_repository(name):
        raise FileNotFoundError(
            f"expected a checkpoint folder, a shipped one ({', '.join(shipped())}) or a Hub id, got {name!r}"
        )
    return reference_to(name, revision)


def _our_commit(reference: Reference, hub: Hub) -> Reference | None:
    """The commit that a name means, if it is a checkpoint of ours: all files have to be of one."""
    try:
        config = hub.fetch(reference, CONFIG)
    except MissingFileError:
        return None  # looking for a backbone says what is missing
    return replace(reference, revision=config.commit) if "format" in read_json(config.path) else None


def _read_ours(fetch: Callable[[str], Path], level: str | None) -> Checkpoint:
    """Our checkpoint, whose files `fetch` finds by name."""
    config = read_config(fetch(CONFIG))
    config = config if level is None else config.until(level)

    def find(name: str) -> Files:
        """The backbone of a level that the checkpoint holds."""
        file = fetch(backbone_file(name))
        return Files(str(file), (file,))

    included = {each.name: partial(find, each.name) for each in config.levels if each.reference is None}
    return Checkpoint(config, read_maps(fetch(MAPS), config), included)
