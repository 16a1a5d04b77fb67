"""Find the weight files of one backbone, wherever a user has them: in a file, a folder or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor

from rd_torch.levels import Level, Reference, split_level
from rd_torch.weights.convention import Convention, own_convention
from rd_torch.weights.esm2_files import ESM2_FILES
from rd_torch.weights.esmc_files import ESMC_FILES
from rd_torch.weights.folder import BACKBONES, CONFIG, backbone_file, read_config
from rd_torch.weights.hub import Hub, MissingFileError
from rd_torch.weights.known import reference_to
from rd_torch.weights.tensors import read_json, read_tensors, require_file

Source: TypeAlias = str | Path | Reference
"""Where a backbone comes from: a file, a folder, a Hub id, or a Hub id with its revision and checksums."""

LAYOUTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""The files by which transformers stores weights, in the order in which they are looked for."""

REGRESSION: Final = "-contact-regression.pt"
"""The end of the name by which fair-esm stores a contact head's regression beside a model's `.pt`."""

CONVENTIONS: Final = (ESMC_FILES, ESM2_FILES)
"""The families that are told by their files, the one with the clearer marks first."""

_PACKAGE: Final = Path(__file__).parents[1]
_SHELVES: Final = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")


@dataclass(frozen=True)
class Files:
    """The weight files of one backbone.

    Attributes:
        place: name of the file, folder or repository, for messages.
        paths: the files.
        reference: the repository, commit and checksums of files that came from the Hub.
        config: the content of transformers' `config.json` beside them; empty where there is none.
        family: name of the family, where it is known from elsewhere.
        level: the level, where a checkpoint of ours states what it is.
    """

    place: str
    paths: tuple[Path, ...]
    reference: Reference | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
    level: Level | None = None

    @cached_property
    def convention(self) -> Convention:
        """The convention of the family that is known, or whose config or names the files have."""
        if self.family is not None:
            return next(
                (each for each in CONVENTIONS if each.family == self.family), own_convention(self.family)
            )
        model_type = self.config.get("model_type")
        for each in CONVENTIONS:
            if model_type == each.model_type:
                return each
        if model_type is not None:
            raise ValueError(
                f"expected an ESM-2 or an ESM-C, whose model_type is 'esm' or 'esmc', got {model_type!r} in "
                f"{self.place}: hf: before its name has transformers load any encoder"
            )
        names = [name for path in self.paths for name, _ in read_tensors(path)]
        return next((each for each in CONVENTIONS if any(map(each.marks.search, names))), ESM2_FILES)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors that the family's modules have; they are mapped into memory, not copied.

        Yields:
            The name that our module gives the tensor, and the tensor.

        Raises:
            ValueError: for a model with absolute positions and no rotary ones, which is no ESM-2.
        """
        has_absolute, has_rotary = False, False
        for path in self.paths:
            for name_in_file, tensor in read_tensors(path):
                has_absolute |= "position_embeddings" in name_in_file
                for name, part in self.convention.renamed(name_in_file, tensor):
                    has_rotary |= name.endswith("inv_freq")
                    yield name, part
        if has_absolute and not has_rotary:
            raise ValueError(f"expected an ESM-2, got a model with absolute positions in {self.place}")


def shipped_checkpoints() -> dict[str, Path]:
    """Return the folders of the checkpoints that come with the package, by name.

    They lie inside the package when it is installed, and beside it in a source tree.
    """
    return {
        config.parent.name: config.parent
        for shelf in _SHELVES
        for config in sorted(shelf.glob("*/config.json"))
    }


def find_here(name: str | Path) -> Path:
    """Return the path that a name stands for, which is a shipped checkpoint's where the name is its own."""
    path = Path(name)
    return path if path.exists() else shipped_checkpoints().get(str(name), path)


def find_backbone(source: Source, hub: Hub, level: str | None = None) -> Files:
    """Find the files that a source names, and download them if need be.

    Args:
        source: a file, a folder, the name of a shipped checkpoint, a Hub id or a reference. The revisions and
            checksums of ESM-2's own repositories are known, and checked.
        hub: how to reach the Hub.
        level: name of the level to take from a folder that is a checkpoint of ours.

    Returns:
        The files.

    Raises:
        FileNotFoundError: if there is nothing at the source.
        ValueError: for a checksum that differs, a config that cannot be read, or a checkpoint of ours without
            the level's backbone.
    """
    if isinstance(source, Reference):
        return _fetch(source, hub)
    path = find_here(source)
    path = _own_file(path, level) if _is_own(path) else path
    if stated := _stated_level(path):
        return Files(str(path), (path,), family=stated.family, level=stated)
    if path.exists():
        return Files(str(path), tuple(_list_files(path)), config=_config_beside(path))
    if isinstance(source, Path) or not looks_like_a_repository(source):
        raise FileNotFoundError(f"expected a file, a folder or a Hub id, got none of them: {str(source)!r}")
    return _fetch(reference_to(source), hub)


def read_model_config(name: str, hub: Hub, revision: str | None = None) -> dict[str, Any]:
    """Read transformers' `config.json` of a model.

    Args:
        name: a folder or a Hub id.
        hub: how to reach the Hub.
        revision: commit, tag or branch of a Hub id.

    Returns:
        Its content; empty where there is none.

    Raises:
        FileNotFoundError: if the network fails and the file is not in the cache.
        ValueError: for a file that cannot be read.
    """
    if Path(name).exists() or not looks_like_a_repository(name):
        return _config_beside(Path(name))
    with suppress(MissingFileError):
        return read_json(hub.fetch(reference_to(name, revision), CONFIG).path)
    return {}


def is_native(name: str, hub: Hub, revision: str | None = None) -> bool:
    """Return whether a model's config says that it is computed as a family that is here natively.

    Args:
        name: a folder or a Hub id.
        hub: how to reach the Hub.
        revision: commit, tag or branch of a Hub id.
    """
    config = read_model_config(name, hub, revision)
    if "auto_map" in config:  # its own code may compute something else
        return False
    for convention in CONVENTIONS:
        if config.get("model_type") == convention.model_type:
            with suppress(ValueError):
                convention.check(config, name)
                return True
    return False


def _is_own(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of ours."""
    return (folder / CONFIG).is_file() and "format" in read_json(folder / CONFIG)


def _own_file(folder: Path, level: str | None) -> Path:
    """Return the file of a level's backbone in a checkpoint of ours; raise a ValueError if it has none."""
    names = [each.backbone for each in read_config(folder / CONFIG).levels]
    files = {name: folder / backbone_file(name) for name in names}
    held = [name for name, file in files.items() if file.is_file()]
    level = None if level is None else split_level(level)[0]
    if level not in held:
        among = ", ".join(held) or "none"
        raise ValueError(f"expected a level whose backbone is in {folder} ({among}), got {level!r}")
    return files[level]


def _stated_level(path: Path) -> Level | None:
    """Return the deepest level that a checkpoint of ours states for the file of a backbone in it."""
    folder = path.parent.parent
    if path.parent.name != BACKBONES or not (path.is_file() and _is_own(folder)):
        return None
    levels = [each for each in read_config(folder / CONFIG).levels if each.backbone == path.stem]
    return levels[-1] if levels else None


def _config_beside(path: Path) -> dict[str, Any]:
    """Return the content of transformers' config in a folder, or beside a file that transformers wrote."""
    folder = path.parent if path.name in LAYOUTS else path
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _fetch(reference: Reference, hub: Hub) -> Files:
    """Fetch a reference's weight files. Their own reference holds the commit and checksums that were found.

    The config, or the layout that is found, settles the commit of all files, so that no push mixes two.
    """
    pinned, facts = reference, {}
    with suppress(MissingFileError):  # without a config the tensors tell nearly as much
        config = hub.fetch(reference, CONFIG)
        pinned, facts = replace(reference, revision=config.commit), read_json(config.path)
    names, commit = (list(reference.sha256), None) if reference.sha256 else _find_weights(pinned, hub)
    pinned = replace(pinned, revision=commit or pinned.revision)
    fetched = {name: hub.fetch(pinned, name) for name in names}
    paths = tuple(file.path for file in fetched.values())
    commit = next(iter(fetched.values())).commit
    found = Reference(reference.repo, commit, {name: file.sha256 for name, file in fetched.items()})
    return Files(reference.repo, paths, found, facts)


def _find_weights(reference: Reference, hub: Hub) -> tuple[list[str], str]:
    """Return the names of a repository's weight files, in the first layout that it has, and their commit."""
    missing: list[MissingFileError] = []
    for layout in LAYOUTS:
        try:
            found = hub.fetch(reference, layout)
        except MissingFileError as error:
            missing.append(error)
        else:
            names = _read_index(found.path) if layout.endswith(".json") else [layout]
            return names, found.commit
    raise missing[0]


def list_weights(folder: Path) -> list[Path]:
    """Return the files in a folder that are called as transformers or fair-esm call a backbone's weights."""
    layouts = [folder / layout for layout in LAYOUTS if (folder / layout).is_file()]
    return layouts[:1] or [path for path in folder.glob("*.pt") if not path.name.endswith(REGRESSION)]


def looks_like_a_repository(name: str) -> bool:
    """Return whether a name can be a Hub id, `owner/repository`, rather than the path of a weight file."""
    is_file = Path(name).suffix in {".pt", ".pth", ".bin", ".safetensors"}
    return name.count("/") == 1 and ":" not in name and not is_file


def _list_files(path: Path) -> list[Path]:
    """Return the weight files of a local file or folder."""
    if path.is_file():
        regression = path.with_name(path.stem + REGRESSION)
        return [path, regression] if path.suffix == ".pt" and regression.is_file() else [path]
    weights = list_weights(path)
    if len(weights) != 1:
        raise FileNotFoundError(
            f"expected one of {', '.join(LAYOUTS)} or one .pt file in {path}, got {len(weights)} of them"
        )
    if weights[0].suffix == ".json":
        return [require_file(path / name) for name in _read_index(weights[0])]
    return _list_files(weights[0])


def _read_index(index: Path) -> list[str]:
    """Return the names of the files that an index of shards lists, all of which lie beside it."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"expected an index of shards in {index}, got {error!r}") from error
    elsewhere = [name for name in names if Path(name).name != name]
    if elsewhere:
        raise ValueError(f"expected shards beside {index}, got {elsewhere[0]!r}")
    return names
