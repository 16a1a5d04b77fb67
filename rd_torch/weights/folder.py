"""Our own checkpoint: a folder of `config.json`, `maps.safetensors` and `backbones/<level>.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rd_torch.config import RDConfig

CONFIG: Final = "config.json"
MAPS: Final = "maps.safetensors"
BACKBONES: Final = "backbones"
MAP_NAMES: Final = ("W", "b", "m", "V")

Tensors = dict[str, Tensor]


def write_folder(
    folder: Path, config: RDConfig, maps: Mapping[str, Tensors], backbones: Mapping[str, Tensors]
) -> None:
    """Writes a checkpoint; the config comes last, so that a broken-off write does not look whole.

    Args:
        folder: made if need be; files of the same names are replaced.
        config: what the checkpoint is.
        maps: by level, the tensors W, b, m and V of the stage that leads to it.
        backbones: by level, the backbone's tensors under fair-esm's names.
    """
    (folder / BACKBONES).mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    flat = {f"{level}.{name}": part for level, parts in maps.items() for name, part in parts.items()}
    save_file({name: part.contiguous() for name, part in flat.items()}, folder / MAPS)
    for level, tensors in backbones.items():
        save_file(
            {name: part.contiguous() for name, part in tensors.items()},
            folder / BACKBONES / f"{level}.safetensors",
        )
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")


def read_config(folder: Path) -> RDConfig:
    """The config of a checkpoint folder.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is no config of this format.
    """
    path = _required(folder / CONFIG)
    try:
        return RDConfig.from_json(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"expected a checkpoint's config in {path}, got one that does not read: {error}"
        ) from error


def read_folder(
    folder: Path, level: str | None = None
) -> tuple[RDConfig, dict[str, Tensors], dict[str, Tensors]]:
    """Config, maps and backbones of a checkpoint up to `level`; the levels above it are not read.

    Raises:
        FileNotFoundError: for a file that is missing.
        ValueError: for a file that is truncated or does not hold what the config says, or a level
            that is not there.
    """
    config = read_config(folder)
    config = config if level is None else config.until(level)
    flat = _read_tensors(folder / MAPS)
    maps = {}
    for k, larger in enumerate(config.levels[1:]):
        parts = {name: f"{larger.name}.{name}" for name in MAP_NAMES}
        maps[larger.name] = {name: flat[key] for name, key in parts.items() if key in flat}
        _check_maps(folder / MAPS, config, k, maps[larger.name])
    backbones = {
        each.name: _read_tensors(folder / BACKBONES / f"{each.name}.safetensors") for each in config.levels
    }
    return config, maps, backbones


def _check_maps(path: Path, config: RDConfig, k: int, maps: Tensors) -> None:
    """Raises a ValueError unless the maps of stage k have the shapes that the config says."""
    smaller, larger = config.levels[k], config.levels[k + 1]
    nested = config.predict_from == "nested"
    source = config.widths[smaller.name] if nested else smaller.width
    q, added = larger.width, config.added[k]
    expected = {"W": (source, q), "b": (q,), "m": (q,), "V": (q, added)}
    got = {name: tuple(part.shape) for name, part in maps.items()}
    if got != expected:
        raise ValueError(f"expected the maps of level {larger.name} as {expected}, got {got} in {path}")


def _required(path: Path) -> Path:
    """The path, if there is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file {path}, got nothing there")
    return path


def _read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file."""
    try:
        return load_file(_required(path))
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file, got one that does not read: {path}: {error}"
        ) from error
