"""Read the level and the tensors of one backbone from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rd_torch.backbone import EMBEDDING
from rd_torch.config import ESM2_LEVELS, Level
from rd_torch.weights.files import Files, find_backbone
from rd_torch.weights.hub import Hub
from rd_torch.weights.names import ANGLES, SHARED_ANGLES, complete_tensors
from rd_torch.weights.tensors import Tensors, require_finite


def read_level(files: Files, name: str | None = None) -> Level:
    """Tell a backbone's level from the shapes of its tensors.

    Args:
        files: the backbone's files.
        name: name of the level. By default the backbone is called as the size of ESM-2 that has its shape,
            or, if none has, by the name of its file.

    Returns:
        The level, with the reference of files that came from the Hub.

    Raises:
        ValueError: for files that cannot be read or hold no ESM-2, or another shape than ESM-2 has at `name`.
    """
    level = _infer_level({key: tuple(tensor.shape) for key, tensor in files.tensors()}, name, files)
    return replace(level, reference=files.reference)


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
        level: the backbone's shape.
        dtype: dtype of the weights, by default the stored one; `inv_freq` is kept in float32 at least.
        device: device to put the tensors on; by default the CPU.

    Returns:
        The tensors by fair-esm's names.

    Raises:
        ValueError: for files that cannot be read or hold NaN.
    """
    tensors = {name: _convert(name, tensor, dtype, device) for name, tensor in files.tensors()}
    require_finite(tensors, files.place)
    num_layers, width, heads = level.shape
    try:
        return complete_tensors(tensors, num_layers, width // heads)
    except ValueError as error:
        raise ValueError(f"{error} in {files.place}") from error


def require_unchanged(level: Level, tensors: Mapping[str, Tensor], hub: Hub) -> None:
    """Require that a backbone's tensors are, in their dtype, those that its level's reference points to.

    Args:
        level: the level, with its reference.
        tensors: the backbone's tensors by fair-esm's names.
        hub: how to reach the Hub.

    Raises:
        ValueError: for a level without a reference, or a tensor that differs.
    """
    if level.reference is None:
        raise ValueError(
            f"expected a backbone that came from the Hub at level {level.name}, got one from elsewhere: "
            'save with backbones="included"'
        )
    stored = read_backbone(find_backbone(level.reference, hub), level)
    for name, tensor in tensors.items():
        if not torch.equal(stored[name].to(tensor.dtype), tensor.cpu()):
            raise ValueError(
                f"expected backbone {level.name} as it came from {level.reference.repo}, got a changed "
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


def _infer_level(shapes: Mapping[str, tuple[int, ...]], name: str | None, files: Files) -> Level:
    """Return the level of a backbone whose tensors have these shapes, as `read_level` says."""
    layers = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.")}
    if EMBEDDING not in shapes or not layers:
        examples = ", ".join(sorted(shapes)[:3]) or "no tensors"
        raise ValueError(f"expected an ESM-2 in {files.place}, got a file with {examples}")
    num_layers, width = max(layers) + 1, shapes[EMBEDDING][-1]
    same_shape = [
        size for size in ESM2_LEVELS.values() if (size.num_layers, size.width) == (num_layers, width)
    ]
    angles = shapes.get(SHARED_ANGLES, shapes.get(ANGLES.format(0)))
    regression = shapes.get("contact_head.regression.weight")
    if angles:
        heads = width // (2 * angles[-1])
    elif regression:
        heads = regression[-1] // num_layers
    elif same_shape:
        *_, heads = same_shape[0].shape
    else:
        raise ValueError(
            "expected inv_freq or a contact head, which tell the number of attention heads, in "
            f"{files.place}, got neither"
        )
    size = same_shape[0].name if same_shape and same_shape[0].attention_heads == heads else None
    expected = ESM2_LEVELS.get(name or "")
    if expected and name != size:
        raise ValueError(
            f"expected the {name} of ESM-2, {expected.num_layers} layers of width {expected.width}, "
            f"got {num_layers} layers of width {width} in {files.place}"
        )
    return Level(name or size or Path(files.place).stem.replace(".", "_"), num_layers, width, heads)
