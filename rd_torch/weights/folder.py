"""Our own checkpoint: a folder of `config.json`, `maps.safetensors` and `backbones/<level>.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor

from rd_torch.config import RDConfig
from rd_torch.disk import write_whole
from rd_torch.stage import map_shapes
from rd_torch.weights.card import model_card
from rd_torch.weights.tensors import Tensors, read_json, read_tensors, require_finite

CONFIG: Final = "config.json"
MAPS: Final = "maps.safetensors"
BACKBONES: Final = "backbones"
CARD: Final = "README.md"


def write_folder(
    folder: Path,
    config: RDConfig,
    maps: Mapping[str, Mapping[str, Tensor]],
    backbones: Mapping[str, Mapping[str, Tensor]],
    name: str,
) -> None:
    """Writes a checkpoint; the config comes last, so that a broken-off write does not look whole.

    Args:
        folder: made if need be; files of the same names are replaced.
        config: what the checkpoint is.
        maps: by level, the tensors of the stage that leads to it.
        backbones: by level, the backbone's tensors under fair-esm's names; the others are left out.
        name: what the model card calls it.
    """
    (folder / BACKBONES).mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    flat = {f"{level}.{name}": part for level, parts in maps.items() for name, part in parts.items()}
    files = {MAPS: flat, **{backbone_file(level): tensors for level, tensors in backbones.items()}}
    for level in config.levels:
        if level.name not in backbones:
            (folder / backbone_file(level.name)).unlink(missing_ok=True)
    for path, tensors in files.items():  # never over the old file, from which the tensors may be mapped
        write_whole(folder / path, partial(_write_tensors, tensors), durable=False)
    (folder / CARD).write_text(model_card(config, name))
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    for path in files:  # which safetensors writes for its owner alone
        (folder / path).chmod((folder / CONFIG).stat().st_mode)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def read_config(path: Path) -> RDConfig:
    """The config of a checkpoint.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is no config of this format.
    """
    try:
        return RDConfig.from_dict(read_json(path))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"expected a checkpoint's config in {path}, got one that does not read: {error}"
        ) from error


def read_maps(path: Path, config: RDConfig) -> dict[str, Tensors]:
    """The maps of a config by level; those of other levels are not read.

    Raises:
        FileNotFoundError: for a file that is missing.
        ValueError: for a file that is truncated, holds NaN, or is not what the config says.
    """
    shapes = map_shapes(config)
    flat = dict(read_tensors(path, [f"{name}.{part}" for name in shapes for part in shapes[name]]))
    require_finite(flat, path)
    maps = {}
    for name, expected in shapes.items():
        maps[name] = {part: flat[f"{name}.{part}"] for part in expected if f"{name}.{part}" in flat}
        got = {part: tuple(tensor.shape) for part, tensor in maps[name].items()}
        if got != expected:
            raise ValueError(f"expected the maps of level {name} as {expected}, got {got} in {path}")
    return maps


def backbone_file(level: str) -> str:
    """A backbone's place in a checkpoint."""
    return f"{BACKBONES}/{level}.safetensors"
