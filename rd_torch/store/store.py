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
from rd_torch.store.facts import Facts
from rd_torch.store.windows import Length

Array: TypeAlias = np.ndarray | Tensor


class Store(ABC):
    """Embeddings on disk, read as they are asked for.

    `store["P1"]`, `store[3]`, `store[10:20]` and `store[["P1", "P2"]]` read at full width; `read` at any.
    Iterating gives the identifiers in FASTA order. A store is a data set for a `DataLoader` with any number
    of workers, an array for numpy and scikit-learn where it is pooled, and is pickled by its path: every
    process opens it anew.

    Attributes:
        path: where it lies.
        facts: what was embedded with what; None in files of other programs.
        checksum: of the identifiers and sequences of all records, likewise.
        width: features of an embedding, which a vector has once for every way to pool.
        pool: how residues became a vector a protein, `"mean"` or `"mean+max"` say, or `"none"`, a vector a
            residue.
        model_name: what the file calls the model that made it; None where it does not say.
        layer: the layer of the model that the vectors are of, likewise.
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
        """Opens the files at `_home`."""

    @abstractmethod
    def _shut(self) -> None:
        """Closes them."""

    def _require_open(self) -> None:
        """Opens the files anew in a process that was forked: two would move each other's places in them.

        Raises:
            ValueError: for a store that was closed.
        """
        if self._is_closed:
            raise ValueError(f"expected an open store, got one that was closed: {self.path}")
        if self._process != os.getpid():
            self._process = os.getpid()
            self._open()

    def close(self) -> None:
        """Closes what is open; the store cannot be read any more."""
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
        """The first `width` features of records by identifier, or by place in FASTA order, from 0.

        Of several ways to pool the first features of each, one behind the other.
        """

    def _columns(self, width: int) -> list[slice]:
        """Where the first features of each way to pool stand in a vector."""
        width = min(width, self.width)
        starts = range(0, self.width * max(1, len(pools_of(self.pool))), self.width)
        return [slice(start, start + width) for start in starts]

    @property
    def shape(self) -> tuple[int, int]:
        """Records and features, as of an array.

        Raises:
            AttributeError: without pooling, where lengths differ.
        """
        if self.pool == "none":
            raise AttributeError("expected a pooled store, got one of a vector a residue, which has no shape")
        return len(self), self.width * len(pools_of(self.pool))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All vectors of a pooled store, as `np.asarray` wants them.

        Raises:
            TypeError: without pooling, where lengths differ.
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
        """Several records at once, which a `DataLoader` asks for."""
        return list(self.read(places))

    @property
    def windowed(self) -> list[str]:
        """Identifiers of the records that were embedded in windows, in FASTA order."""
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
        """The embeddings of one record, or of several.

        Args:
            key: an identifier or a place in FASTA order for one; several of them, a slice, or a mask of as
                many truth values as there are records for more.
            width: features from the first on, of each way to pool; by default all.
            as_torch: give tensors, on the CPU, in place of arrays; bfloat16 comes as float32 in arrays.

        Returns:
            Of one record `(ways * width,)`, or `(residues, width)` without pooling; of more
            `(records, ways * width)`, or a list without pooling.

        Raises:
            KeyError: for an identifier that is not there.
            IndexError: for a place that is not there, or a mask of another length.
            TypeError: for what is neither an identifier nor a place.
            ValueError: for a width below 1 or above the store's, and for a store that was closed.
        """
        self._require_open()
        if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
            key = key[0]  # which is how scikit-learn takes rows of an array
        width = self.width if width is None else width
        if not 1 <= width <= self.width:
            raise ValueError(f"expected a width from 1 to {self.width}, got {width}")
        convert = _tensor if as_torch else _array
        if isinstance(key, slice):
            chosen: Sequence[str | int] = range(len(self))[key]
        elif isinstance(key, str) or not isinstance(key, Iterable) or getattr(key, "ndim", 1) == 0:
            return convert(self._rows([self._found(key)], width)[0])
        else:
            chosen = self._several(key)
        rows = [convert(row) for row in self._rows(chosen, width)]
        if self.pool == "none":
            return rows
        features = width * len(pools_of(self.pool))
        if as_torch:
            return torch.stack(rows) if rows else torch.zeros(0, features)  # type: ignore[arg-type]  # tensors
        return np.stack(rows) if rows else np.zeros((0, features), np.float32)

    def _found(self, key: Any) -> str | int:
        """The identifier of one record, or its place counted from 0."""
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

    def _several(self, keys: Iterable[Any]) -> list[str | int]:
        """The same of several records, by identifiers, places or a mask."""
        each = list(keys)
        if each and all(isinstance(key, bool | np.bool_) or _is_truth(key) for key in each):
            if len(each) != len(self):
                raise IndexError(f"expected a mask of {len(self):,} truth values, got {len(each):,}")
            return [place for place, chosen in enumerate(each) if chosen]
        return [self._found(key) for key in each]

    def tensors(self, identifiers: Sequence[str]) -> list[Tensor]:
        """The embeddings of several records, whole and as they are stored, each a tensor of its own.

        Raises:
            KeyError: for an identifier that is not there.
        """
        self._require_open()
        return [_tensor(row) for row in self._rows(identifiers, sys.maxsize)]

    def lengths(self, key: slice = slice(None)) -> list[Length]:
        """Residues of the records of a slice; None of pooled ones, where the store does not say them."""
        self._require_open()
        if self.pool != "none":
            known = self.facts is not None  # files of other programs do not say them
            return [self._length_of(each) if known else None for each in self.identifiers[key]]
        return [len(row) for row in self._rows(range(len(self))[key], 1)]

    def _length_of(self, identifier: str) -> Length:
        """Residues of a pooled record, where the store says them."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_truth(key: Any) -> bool:
    """Whether something is a truth value of torch's."""
    return isinstance(key, Tensor) and key.dtype == torch.bool


def missing(identifier: str, path: Path) -> KeyError:
    """What is raised for an identifier that is not there."""
    return KeyError(f"expected an identifier that is in {path}, got {identifier!r}")


def _tensor(row: Array) -> Tensor:
    return row if isinstance(row, Tensor) else torch.from_numpy(np.ascontiguousarray(row))


def _array(row: Array) -> np.ndarray:
    if isinstance(row, np.ndarray):
        return row
    return (row.float() if row.dtype == torch.bfloat16 else row).numpy()
