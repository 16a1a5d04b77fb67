"""`Store`: embeddings on disk, read by identifier, place or mask, as a data set."""

from __future__ import annotations

import operator
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rd_torch.pooling import pools_of
from rd_torch.store.conversions import Conversions
from rd_torch.store.facts import Facts
from rd_torch.store.windows import Length

Array: TypeAlias = np.ndarray | Tensor
"""The embedding of a record as its format reads it."""


class Store(Conversions, ABC):
    """Embeddings on disk, which are read when they are asked for.

    `store["P1"]`, `store[3]`, `store[10:20]` and `store[["P1", "P2"]]` read embeddings at full width, and
    `read` at any width. A loop over a store gives the identifiers in FASTA order. A store serves as a data
    set for a `DataLoader` with any number of workers, and, where it is pooled, as an array for numpy and
    scikit-learn. It is pickled by its path: every process opens it anew.

    Attributes:
        path: the file or folder.
        facts: what was embedded with what; None in files of other programs.
        checksum: checksum of the identifiers and sequences of all records; None in files of other programs.
        width: number of features of an embedding; a vector has them once for each way to pool.
        pool: how the residues of a protein became one vector, as `"mean"` or `"mean+max"`; or `"none"` for a
            vector for each residue.
        model_name: the name that the file gives the model which made it; None where it gives none.
        layer: the layer of the model whose output the vectors are; None where the file does not say.
    """

    facts: Facts | None
    checksum: str | None
    width: int
    pool: str
    model_name: str | None
    layer: int | None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._home = path.absolute()
        self._process = os.getpid()
        self._is_closed = False
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Open the files at `_home`."""

    @abstractmethod
    def _shut(self) -> None:
        """Close them."""

    def _require_open(self) -> None:
        """Open the files anew in a process that was forked: two would move each other's position in them.

        Raises:
            ValueError: for a store that was closed.
        """
        if self._is_closed:
            raise ValueError(f"expected an open store, got one that was closed: {self.path}")
        if self._process != os.getpid():
            self._process = os.getpid()
            self._open()

    def close(self) -> None:
        """Close what is open; the store cannot be read any more."""
        self._is_closed = True
        self._shut()

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self._home,)

    @property
    @abstractmethod
    def identifiers(self) -> Sequence[str]:
        """Names of the records, in FASTA order."""

    @abstractmethod
    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        """Read the first `width` features of records, by identifier or by place in FASTA order, from 0.

        Where there are several ways to pool, the first features of each stand one behind the other.
        """

    def _columns(self, width: int) -> list[slice]:
        """Return the columns of a vector that hold the first features of each way to pool."""
        width = min(width, self.width)
        starts = range(0, self.width * max(1, len(pools_of(self.pool))), self.width)
        return [slice(start, start + width) for start in starts]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of records and of features, as an array has them.

        Returns:
            Both numbers.

        Raises:
            AttributeError: for a store of a vector for each residue, where lengths differ.
        """
        if self.pool == "none":
            raise AttributeError("expected a pooled store, got one of a vector a residue, which has no shape")
        return len(self), self.width * len(pools_of(self.pool))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All vectors of a pooled store, as `np.asarray` asks for them.

        Returns:
            An array `(records, features)`.

        Raises:
            TypeError: for a store of a vector for each residue, where lengths differ.
            ValueError: for a copy that must not be made.
        """
        if self.pool == "none":
            raise TypeError(
                "expected a pooled store, got one of a vector a residue: read its records one by one"
            )
        if copy is False:
            raise ValueError("expected leave to copy, got copy=False: what lies on disk must be read")
        return np.asarray(self.read(slice(None)), dtype)

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        """Return the embeddings of several records at once, as a `DataLoader` asks for them."""
        return list(self.read(places))

    @property
    def windowed(self) -> list[str]:
        """Identifiers of the records that were embedded in overlapping pieces, in FASTA order."""
        facts = self.facts
        if facts is None or facts.windows is None:
            return []
        pairs = zip(self.identifiers, self.lengths(), strict=True)
        return [identifier for identifier, length in pairs if facts.is_windowed(length)]

    def __len__(self) -> int:
        return len(self.identifiers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.identifiers)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self.identifiers

    def __getitem__(self, key: Any) -> Any:
        return self.read(key)

    def read(
        self,
        key: Any,
        *,
        width: int | None = None,
        as_torch: bool = False,
    ) -> Array | list[Array]:
        """Read the embedding of one record, or those of several.

        Args:
            key: for one record its identifier or its place in FASTA order, from 0; for several a list of
                identifiers or places, a slice, or a mask of as many truth values as there are records.
            width: number of features to read, from the first on, for each way to pool; by default all.
            as_torch: give tensors, on the CPU, instead of arrays; an array holds bfloat16 as float32.

        Returns:
            For one record `(ways * width,)`, or `(residues, width)` without pooling; for several
            `(records, ways * width)`, or a list without pooling.

        Raises:
            KeyError: for an identifier that is not in the store.
            IndexError: for a place that is not in the store, or a mask of another length.
            TypeError: for a key that is neither an identifier nor a place.
            ValueError: for a width below 1 or above the store's, and for a store that was closed.
        """
        self._require_open()
        if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
            key = key[0]  # scikit-learn asks for rows as `array[rows, ...]`
        width = self.width if width is None else width
        if not 1 <= width <= self.width:
            raise ValueError(f"expected a width from 1 to {self.width}, got {width}")
        convert = _tensor if as_torch else _array
        if isinstance(key, slice):
            chosen: Sequence[str | int] = range(len(self))[key]
        elif isinstance(key, str) or not isinstance(key, Iterable) or getattr(key, "ndim", 1) == 0:
            return convert(self._rows([self._one_key(key)], width)[0])
        else:
            chosen = self._several_keys(key)
        rows = [convert(row) for row in self._rows(chosen, width)]
        if self.pool == "none":
            return rows
        features = width * len(pools_of(self.pool))
        if as_torch:
            return torch.stack(rows) if rows else torch.zeros(0, features)  # type: ignore[arg-type]  # tensors
        return np.stack(rows) if rows else np.zeros((0, features), np.float32)

    def _one_key(self, key: Any) -> str | int:
        """Return the identifier of a record, or its place counted from 0."""
        if isinstance(key, str):
            return key
        if isinstance(key, bool | np.bool_):
            raise TypeError(f"expected an identifier or a place, got {key!r}")
        try:
            place = operator.index(key)
        except TypeError as error:
            raise TypeError(f"expected an identifier or a place, got {type(key).__name__}") from error
        try:
            return range(len(self))[place]
        except IndexError as error:
            raise IndexError(f"expected a place below {len(self):,}, got {place}") from error

    def _several_keys(self, keys: Iterable[Any]) -> list[str | int]:
        """Return the identifiers or places of several records, which may be given by a mask."""
        each = list(keys)
        if each and all(isinstance(key, bool | np.bool_) or _is_truth(key) for key in each):
            if len(each) != len(self):
                raise IndexError(f"expected a mask of {len(self):,} truth values, got {len(each):,}")
            return [place for place, chosen in enumerate(each) if chosen]
        return [self._one_key(key) for key in each]

    def tensors(self, identifiers: Sequence[str]) -> list[Tensor]:
        """Read whole embeddings, in the type of number in which they are stored.

        Args:
            identifiers: identifiers of the records.

        Returns:
            A tensor for each of them.

        Raises:
            KeyError: for an identifier that is not in the store.
        """
        self._require_open()
        return [_tensor(row) for row in self._rows(identifiers, sys.maxsize)]

    def lengths(self, key: slice = slice(None)) -> list[Length]:
        """Read how many residues records have.

        Args:
            key: which records, in FASTA order; by default all.

        Returns:
            The number for each of them; None for a pooled record whose number the store does not say.
        """
        self._require_open()
        if self.pool != "none":
            known = self.facts is not None  # files of other programs do not say how many
            return [self._length_of(each) if known else None for each in self.identifiers[key]]
        return [len(row) for row in self._rows(range(len(self))[key], 1)]

    def _length_of(self, identifier: str) -> Length:
        """Return the number of residues of a pooled record, where the store says it."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_truth(key: Any) -> bool:
    """Whether a key is a truth value of torch's."""
    return isinstance(key, Tensor) and key.dtype == torch.bool


def missing_message(identifier: str, path: Path) -> str:
    """Return what a KeyError says of an identifier that is not in a store."""
    return f"expected an identifier that is in {path}, got {identifier!r}"


def _tensor(row: Array) -> Tensor:
    """Return the embedding of a record as a tensor."""
    return row if isinstance(row, Tensor) else torch.from_numpy(np.ascontiguousarray(row))


def _array(row: Array) -> np.ndarray:
    """Return the embedding of a record as an array, which has no bfloat16."""
    if isinstance(row, np.ndarray):
        return row
    return (row.float() if row.dtype == torch.bfloat16 else row).numpy()
