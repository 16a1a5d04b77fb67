"""Read files of tensors: safetensors, `.bin` and `.pt`.

Tensors are mapped into memory, not copied. A file that would run code when it is loaded is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Tensors = dict[str, Tensor]

# What `torch.load` raises for files that are cut off, damaged, or not allowed.
_BROKEN_PICKLE: Final = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
)


def require_file(path: Path) -> Path:
    """Return the path if a file is there.

    Raises:
        FileNotFoundError: if no file is there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file {path}, got nothing there")
    return path


def sha256_of(path: Path) -> str:
    """Return a file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: the file.

    Returns:
        The object, as a dictionary.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for a file that holds no JSON object.
    """
    try:
        content = json.loads(require_file(path).read_text())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got a file that cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content


def read_tensors(path: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a file. The disk is read only when a tensor's numbers are used.

    Args:
        path: the file. A pickle of fair-esm's holds its tensors under `"model"`; others are the dictionary of
            tensors themselves.
        wanted: names of the tensors to read, as far as the file has them; by default all.

    Yields:
        The name and the tensor, one after the other.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for a file that is cut off or damaged, or that holds anything but tensors and settings.
    """
    if path.suffix == ".safetensors":
        yield from _read_safetensors(path, wanted)
        return
    content = _read_pickle(path)
    for name, tensor in content.get("model", content).items():
        if wanted is None or name in wanted:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"expected tensors in {path}, got {name} of type {type(tensor).__name__}")
            yield name, tensor


def require_finite(tensors: Mapping[str, Tensor], place: object) -> None:
    """Require that no tensor holds a NaN or an infinity.

    Args:
        tensors: the tensors by name.
        place: where they come from, for the message.

    Raises:
        ValueError: for the first tensor that does, with its name.
    """
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point():
            lowest, highest = tensor.aminmax()  # both are NaN if any number is
            if not (lowest.isfinite() and highest.isfinite()):
                raise ValueError(f"expected finite numbers in {place}, got NaN or infinity in {name}")


def _read_safetensors(path: Path, wanted: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(require_file(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if wanted is None or name in wanted:
                    yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"expected a whole safetensors file, got one that cannot be read: {path}: {error}"
        ) from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """Load a file of `torch.save` that names no classes but tensors and fair-esm's `argparse.Namespace`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                require_file(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _BROKEN_PICKLE as error:
        # torch's own text goes on to recommend `weights_only=False`, with which the file could run its code.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error) or repr(error)
        raise ValueError(
            f"expected a whole file of tensors in {path}, got one that cannot be read, or that would run "
            f"code if it were trusted; nothing of it was run: {reason.splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model", content), Mapping):
        raise ValueError(f"expected a dictionary of tensors in {path}, got {type(content).__name__}")
    return content
