"""Our own checkpoints: folders of `config.json`, `maps.safetensors` and `backbones/<level>.safetensors`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
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
RECONSTRUCTION: Final = "reconstruction.safetensors"
BACKBONES: Final = "backbones"
CARD: Final = "README.md"


def write_folder(
    folder: Path,
    config: RDConfig,
    maps: Mapping[str, Mapping[str, Tensor]],
    backbones: Mapping[str, Mapping[str, Tensor]],
    name: str,
    folders: Collection[str] = (),
    reconstruction: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint with its model card.

    Args:
        folder: the folder to write. It is made if it does not exist; files of the same names are replaced.
        config: the config, with a reference for each level whose backbone is not written.
        maps: by level, the tensors of the stage that leads to it.
        backbones: by name, the tensors of the backbones to write, by the names of their own modules.
        name: name of the checkpoint in the model card.
        folders: names of backbones that are in the checkpoint already, as folders of their own.
        reconstruction: tensors from which raw embeddings are reconstructed, if they are known.
    """
    (folder / BACKBONES if backbones else folder).mkdir(parents=True, exist_ok=True)
    # The config is removed first and written last, so that a write that is cut off does not look whole.
    (folder / CONFIG).unlink(missing_ok=True)
    flat = {f"{level}.{name}": part for level, parts in maps.items() for name, part in parts.items()}
    files = {MAPS: flat, **{backbone_file(each): tensors for each, tensors in backbones.items()}}
    if reconstruction is None:
        (folder / RECONSTRUCTION).unlink(missing_ok=True)
    else:
        files[RECONSTRUCTION] = reconstruction
    for each in {level.backbone for level in config.levels}:
        if each not in backbones:
            (folder / backbone_file(each)).unlink(missing_ok=True)
        if each not in folders and (folder / BACKBONES / each).is_dir():
            shutil.rmtree(folder / BACKBONES / each)
    for path, tensors in files.items():  # never over the old file, from which the tensors may be mapped
        write_whole(folder / path, partial(_write_tensors, tensors), durable=False)
    (folder / CARD).write_text(model_card(config, name, {*backbones, *folders}))
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    for path in files:  # safetensors lets the owner alone read its files
        (folder / path).chmod((folder / CONFIG).stat().st_mode)


def require_no_backbones(folder: Path) -> None:
    """Require that a folder, if it is there, holds no backbones, before maps alone are written to it.

    Args:
        folder: the folder.

    Raises:
        ValueError: for a folder that does.
    """
    if any((folder / BACKBONES).glob("*")):
        raise ValueError(
            f"expected a folder without backbones to write maps alone to, got {folder}: choose another "
            "folder, because its backbones would be lost"
        )


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def read_config(path: Path) -> RDConfig:
    """Read the config of a checkpoint.

    Args:
        path: the file `config.json`.

    Returns:
        The config.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for a file that is no config of this format.
    """
    try:
        return RDConfig.from_dict(read_json(path))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"expected the config of a checkpoint in {path}, got a file that cannot be read as one: {error}"
        ) from error


def read_maps(path: Path, config: RDConfig) -> dict[str, Tensors]:
    """Read the maps of the levels in a config; those of other levels are not read.

    Args:
        path: the file `maps.safetensors`.
        config: the config, which says what shapes the maps have.

    Returns:
        By level, the tensors of the stage that leads to it.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for a file that is cut off, holds NaN, or has other shapes than the config says.
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


def backbone_file(name: str) -> str:
    """Return the path of a backbone, relative to the checkpoint."""
    return f"{BACKBONES}/{name}.safetensors"
