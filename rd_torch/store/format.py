"""What every format of a store can do: write a window, be finished, be opened and read."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rd_torch.store.facts import Facts, Pool
from rd_torch.store.windows import Length, Window

Row: TypeAlias = tuple[int, Tensor]
"""The place of a record in its window, and its `(width,)` or `(residues, width)` embedding as it is saved."""

Array: TypeAlias = np.ndarray | Tensor


class Store(ABC):
    """Embeddings on disk, read as they are asked for.

    `store["P1"]`, `store[3]`, `store[10:20]` and `store[["P1", "P2"]]` read at full width; `read` at any.
    Iterating gives the identifiers in FASTA order.

    Attributes:
        path: where it lies.
        facts: what was embedded with what; None in files of other programs.
        checksum: of the identifiers and sequences of all records, likewise.
        width: features of a vector.
        pool: `"mean"`, a vector a protein, or `"none"`, a vector a residue.
    """

    path: Path
    facts: Facts | None
    checksum: str | None
    width: int
    pool: Pool

    @property
    @abstractmethod
    def identifiers(self) -> Sequence[str]:
        """Names of the records, in FASTA order."""

    @abstractmethod
    def _rows(self, keys: Sequence[str] | range, width: int) -> list[Array]:
        """The first `width` features of records by identifier, or by place in FASTA order."""

    @abstractmethod
    def close(self) -> None:
        """Closes what is open; the store cannot be read any more."""

    def __len__(self) -> int:
        return len(self.identifiers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.identifiers)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self.identifiers

    def __getitem__(self, key: str | int | slice | Sequence[str]) -> Any:
        return self.read(key)

    def read(
        self,
        key: str | int | slice | Sequence[str],
        *,
        width: int | None = None,
        as_torch: bool = False,
    ) -> Array | list[Array]:
        """The embeddings of one record, or of several.

        Args:
            key: an identifier or a place in FASTA order for one; several identifiers or a slice for more.
            width: features from the first on; by default all.
            as_torch: give tensors, on the CPU, in place of arrays; bfloat16 comes as float32 in arrays.

        Returns:
            Of one record `(width,)`, or `(residues, width)` without pooling; of more `(records, width)`, or
            a list without pooling.

        Raises:
            KeyError: for an identifier that is not there.
            IndexError: for a place that is not there.
            ValueError: for a width below 1 or above the store's.
        """
        width = self.width if width is None else width
        if not 1 <= width <= self.width:
            raise ValueError(f"expected a width from 1 to {self.width}, got {width}")
        convert = _tensor if as_torch else _array
        if isinstance(key, str):
            return convert(self._rows([key], width)[0])
        if isinstance(key, slice):
            chosen: Sequence[str] | range = range(len(self))[key]
        elif isinstance(key, int):
            chosen = range(len(self))[key : key + 1 or None]
            if not chosen:
                raise IndexError(f"expected a place below {len(self):,}, got {key}")
            return convert(self._rows(chosen, width)[0])
        else:
            chosen = key
        rows = [convert(row) for row in self._rows(chosen, width)]
        if self.pool == "none":
            return rows
        if as_torch:
            return torch.stack(rows) if rows else torch.zeros(0, width)  # type: ignore[arg-type]  # all tensors
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)

    def tensors(self, identifiers: Sequence[str]) -> list[Tensor]:
        """The embeddings of several records, whole and as they are stored, each a tensor of its own.

        Raises:
            KeyError: for an identifier that is not there.
        """
        return [_tensor(row) for row in self._rows(identifiers, sys.maxsize)]

    def lengths(self, key: slice = slice(None)) -> list[Length]:
        """Residues of the records of a slice; None of pooled ones, where the store does not say them."""
        chosen = range(len(self))[key]
        return [None if self.pool == "mean" else len(row) for row in self._rows(chosen, 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def missing(identifier: str, path: Path) -> KeyError:
    """What is raised for an identifier that is not there."""
    return KeyError(f"expected an identifier that is in {path}, got {identifier!r}")


class Format(ABC):
    """One way to lay a store out.

    Attributes:
        name: what `--format` calls it, and the suffix without its dot.
        dtypes: what it can hold.
        pools: how residues can be pooled in it.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    pools: ClassVar[tuple[Pool, ...]]

    @staticmethod
    @abstractmethod
    def key(name: str) -> str:
        """What must differ between the names of two records."""

    @abstractmethod
    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """Writes a window to files of its own in `folder`, each whole or not at all; returns them.

        Records that do not come are left out; rows come in any order.
        """

    @abstractmethod
    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """Makes the finished store of the written windows under another name, then renames it.

        Args:
            folder: where the windows are.
            names: each record in FASTA order, with its window's first file.
            facts: written into the store.
            checksum: of all records, written into the store.
            path: the store; nothing is there yet.
        """

    @abstractmethod
    def open(self, path: Path) -> Store:
        """Opens a finished store."""


def require_fitting(form: Format, facts: Facts) -> None:
    """Raises a ValueError for a dtype or pooling that the format does not take."""
    for what, got, taken in (
        ("save_dtype", facts.save_dtype, form.dtypes),
        ("pool", facts.pool, form.pools),
    ):
        if got not in taken:
            raise ValueError(
                f"expected {what} to be one of {', '.join(map(repr, taken))} in .{form.name}, got {got!r}"
            )


def require_folder(path: Path) -> None:
    """Raises a FileNotFoundError where the folder of a file that will be written is not there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder {path.parent} to write to, got nothing there")


def written_whole(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Calls `write` with a name beside `path`, then renames: the file is there whole, or not at all.

    Args:
        path: the file.
        write: writes it.
        durable: wait until the disk has it, so that it outlives a power cut.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        if durable:
            sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the disk has a file, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensor(row: Array) -> Tensor:
    return row if isinstance(row, Tensor) else torch.from_numpy(np.ascontiguousarray(row))


def _array(row: Array) -> np.ndarray:
    if isinstance(row, np.ndarray):
        return row
    return (row.float() if row.dtype == torch.bfloat16 else row).numpy()
