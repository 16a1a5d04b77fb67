"""HDF5 as UniProt ships embeddings: one dataset a protein, named by its identifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np


def dataset_name(identifier: str) -> str:
    """The dataset's name of an identifier: HDF5 reads `/` as a path and `.` as a place."""
    return identifier.replace("/", "%2F") if identifier != "." else "%2E"


def check_identifiers(identifiers: Iterable[str]) -> None:
    """Raises a ValueError when two identifiers have one dataset name."""
    taken: dict[str, str] = {}
    for identifier in identifiers:
        other = taken.setdefault(dataset_name(identifier), identifier)
        if other != identifier:
            raise ValueError(
                f"expected identifiers of different dataset names, got {other} and {identifier}: rename one"
            )


@contextmanager
def write_embeddings(
    path: Path, attributes: Mapping[str, Any]
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Opens an embedding file for writing and hands out `add(identifier, array)`.

    The file comes under its final name when the block ends without an error, and not at all otherwise;
    a file that was there before stays until then.

    Args:
        path: the final name.
        attributes: what is written at the root of the file.

    Raises:
        FileNotFoundError: when the folder is not there.
        IsADirectoryError: when the name is a folder's.
    """
    if path.is_dir():
        raise IsADirectoryError(f"expected the name of a file to write, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder {path.parent} to write to, got nothing there")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            file.attrs.update(attributes)
            yield lambda identifier, array: _add(file, identifier, array)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _add(file: h5py.File, identifier: str, array: np.ndarray) -> None:
    """Writes one protein."""
    file.create_dataset(dataset_name(identifier), data=array)
