"""Tensor files: safetensors, `.bin` and `.pt`, mapped into memory; whatever would run code is refused."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Tensors = dict[str, Tensor]

BROKEN_PICKLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError)


def require_file(path: Path) -> Path:
    """The path, if there is a file.

    Raises:
        FileNotFoundError: where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file {path}, got nothing there")
    return path


def sha256_of(path: Path) -> str:
    """A file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for one that holds no JSON object.
    """
    try:
        content = json.loads(require_file(path).read_text())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got what does not read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content


def read_tensors(path: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, or the wanted ones it has; their pages are read when they are used.

    fair-esm's files hold their tensors under `"model"`; elsewhere the file is the dictionary.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that does not read whole, or holds anything but tensors and settings.
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
    """Raises a ValueError that names the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point():
            lowest, highest = tensor.aminmax()  # both are NaN where anything is
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
            f"expected a whole safetensors file, got one that does not read: {path}: {error}"
        ) from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """A file of `torch.save`; it may name no classes but tensors and fair-esm's `argparse.Namespace`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                require_file(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except BROKEN_PICKLE as error:
        # torch's own text goes on to advise what must not be done
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error) or repr(error)
        raise ValueError(
            f"expected a whole file of tensors in {path}, got one that does not read, or that would run "
            f"code if it were trusted; nothing of it was run: {reason.splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model", content), Mapping):
        raise ValueError(f"expected a dictionary of tensors in {path}, got {type(content).__name__}")
    return content
