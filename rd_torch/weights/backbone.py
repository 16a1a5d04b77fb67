"""Read the level and the tensors of one backbone from its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from rd_torch.backbone import class_of
from rd_torch.levels import Level, split_level
from rd_torch.modules import as_module_name
from rd_torch.weights.convention import published_size
from rd_torch.weights.files import Files
from rd_torch.weights.tensors import Tensors, require_finite

_LAYER: Final = re.compile(r"layers\.(\d+)\.")
"""The beginning of the name of a layer's tensor, with the number of the layer, from 0."""

_STATED: Final = {
    "num_layers": ("num_hidden_layers", "n_layers"),
    "width": ("hidden_size", "d_model"),
    "attention_heads": ("num_attention_heads", "n_heads"),
}
"""For each part of a level's shape, its names in `config.json`, the second that of research checkpoints."""


def read_level(files: Files, name: str | None = None) -> Level:
    """Tell a backbone's level as its checkpoint states it, or from the shapes of its tensors.

    Args:
        files: the backbone's files.
        name: name of the level. By default the backbone is called as the published size of its family that
            has its shape, or, if none has, by the name of its file.

    Returns:
        The level, at the layer that its name states, with the reference of files that came from the Hub.

    Raises:
        ValueError: for files that cannot be read or hold no backbone, fewer layers than the level takes, or
            another shape than their config states or their family has at `name`.
    """
    convention = files.convention
    convention.check(files.config, files.place)
    found = files.level
    if found is None:
        shapes = {key: tuple(tensor.shape) for key, tensor in files.tensors()}
        found = convention.level_of(shapes, files.config, files.place)
    num_layers, width, heads = found.shape
    _require_stated(found, files)
    size = published_size(convention.sizes, num_layers, width)
    called = size.name if size and size.attention_heads == heads else None
    backbone = split_level(name or "")[0]
    expected = convention.sizes.get(backbone)
    if expected and backbone != called:
        raise ValueError(
            f"expected the {backbone} of {convention.title}, {expected.num_layers} layers of width "
            f"{expected.width}, got {found.num_layers} layers of width {found.width} in {files.place}"
        )
    if name is None and not found.is_last:
        name = found.name  # as the checkpoint calls the backbone that it has cut there
    name = name or called or as_module_name(Path(files.place).stem)
    there, found = found.depth, replace(found, name=name, reference=files.reference)
    if there is not None and found.depth is not None and found.depth > there:
        raise ValueError(
            f"expected a file that reaches layer {found.depth}, which level {name} takes, got one of the "
            f"first {there} layers of {num_layers} in {files.place}"
        )
    return found


def _require_stated(level: Level, files: Files) -> None:
    """Raise a ValueError for tensors of another shape than the config beside them states, such as too few."""
    for attribute, keys in _STATED.items():
        got = getattr(level, attribute)
        for key in keys:
            if files.config.get(key, got) != got:
                raise ValueError(
                    f"expected a model with {key} {files.config[key]}, as config.json says, got {got} in the "
                    f"tensors of {files.place}"
                )


def read_backbone(
    files: Files,
    level: Level,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensors:
    """Read a backbone's tensors.

    Tensors are converted and moved one by one, so that memory never holds all of them twice. A tensor that
    needs neither stays a view of the mapped file.

    Args:
        files: the backbone's files.
        level: the backbone's shape, and the last layer that is read.
        dtype: dtype of the weights, by default the stored one; `inv_freq` is kept in float32 at least.
        device: device to put the tensors on; by default the CPU.

    Returns:
        The tensors by the names of the family's own modules.

    Raises:
        ValueError: for files that cannot be read or hold NaN.
    """
    tensors = {
        name: _convert(name, tensor, dtype, device)
        for name, tensor in files.tensors()
        if _is_needed(name, level)
    }
    require_finite(tensors, files.place)
    try:
        return files.convention.completed(tensors, level)
    except ValueError as error:
        raise ValueError(f"{error} in {files.place}") from error


def _is_needed(name: str, level: Level) -> bool:
    """Return whether a level needs a tensor; one of a hidden layer needs none above it, and no head."""
    layer = _LAYER.match(name)
    if layer:
        return int(layer[1]) < (level.depth or 0)
    return level.is_last or name.partition(".")[0] not in class_of(level).heads


def require_unchanged(level: Level, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Require that a backbone's tensors are, in their dtype, those that its level's reference points to.

    Args:
        level: the level, with its reference.
        tensors: the backbone's tensors by name.
        stored: the tensors that were read from where the reference points to.

    Raises:
        ValueError: for a tensor that differs.
    """
    for name, tensor in tensors.items():
        if not torch.equal(stored[name].to(tensor.dtype), tensor.cpu()):
            place = level.reference.repo if level.reference else "elsewhere"
            raise ValueError(
                f"expected backbone {level.name} as it came from {place}, got a changed "
                f'{name}: save with backbones="included"'
            )


def _convert(
    name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """Return a tensor in `dtype` and on `device`; `inv_freq` is kept in float32 at least."""
    if not tensor.is_floating_point():
        raise ValueError(f"expected floating-point weights, got {name} of {tensor.dtype}")
    if dtype is not None and name.endswith("inv_freq"):
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(device=device, dtype=dtype)
