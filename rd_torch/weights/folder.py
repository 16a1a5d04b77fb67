"""Our own checkpoint: a folder of `config.json`, `maps.safetensors` and `backbones/<level>.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rd_torch.config import RDConfig

CONFIG: Final = "config.json"
MAPS: Final = "maps.safetensors"
BACKBONES: Final = "backbones"

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
    for path in folder.rglob("*.safetensors"):  # which safetensors writes for its owner alone
        path.chmod((folder / CONFIG).stat().st_mode)


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
    shapes = config.map_shapes
    flat = _read_tensors(folder / MAPS, [f"{name}.{part}" for name in shapes for part in shapes[name]])
    maps = {}
    for name, expected in shapes.items():
        maps[name] = {part: flat[f"{name}.{part}"] for part in expected if f"{name}.{part}" in flat}
        got = {part: tuple(tensor.shape) for part, tensor in maps[name].items()}
        if got != expected:
            raise ValueError(f"expected the maps of level {name} as {expected}, got {got} in {folder / MAPS}")
    backbones = {
        each.name: _read_tensors(folder / BACKBONES / f"{each.name}.safetensors") for each in config.levels
    }
    return config, maps, backbones


def _required(path: Path) -> Path:
    """The path, if there is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file {path}, got nothing there")
    return path


def _read_tensors(path: Path, wanted: Collection[str] | None = None) -> Tensors:
    """The tensors of a safetensors file, or those of the wanted ones that it has."""
    try:
        with safe_open(_required(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted is None or name in wanted}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file, got one that does not read: {path}: {error}"
        ) from error
