"""Read the sequences in Python's containers: lists, columns and records; refuse what has another meaning."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, MappingView, Set
from typing import Any

import numpy as np
from torch import Tensor

from rd_torch.reading.proteins import Proteins
from rd_torch.sequences import Entry, Protein

_A_LIST = (
    "a list, a Series, Index or array of strings, Bio.Seq objects, records, or (identifier, sequence) pairs"
)


def sequences_of(given: Any) -> Iterator[str]:
    """Read the sequences in a container, in its order.

    Args:
        given: a list, tuple, iterator, pandas Series or Index, one-dimensional numpy array or pyarrow column
            of strings, `Bio.Seq` objects, `SeqRecord`s, `Protein`s or `(identifier, sequence)` pairs; or
            `Proteins`.

    Returns:
        The sequences as they are written.

    Raises:
        TypeError: for what has no order or more than one meaning, and for an item that is no sequence, with
            its number, from 1.
    """
    require_ordered(given, "one column of it, such as frame['sequence']", "list(sequences.values())")
    return (_sequence(item, number) for number, item in enumerate(given, start=1))


def entries_of(given: Any, identifier: str = "word") -> Iterator[Entry]:
    """Read the records in a container, in its order.

    Args:
        given: `Proteins`, or an iterable of `(identifier, sequence)` pairs, `Protein`s or `SeqRecord`s.
        identifier: the rule for headers where `Proteins` was given none.

    Returns:
        The records; one without a sequence has a fault.

    Raises:
        TypeError: as `sequences_of`, and for sequences without identifiers.
    """
    if isinstance(given, Proteins):
        return given.entries(identifier)
    require_ordered(given, "zip(frame['id'], frame['sequence'])", "sequences.items()")
    return (_entry(item, number) for number, item in enumerate(given, start=1))


def require_ordered(given: Any, instead_of_table: str, instead_of_mapping: str) -> None:
    """Require a container of items in an order.

    A table would iterate over its columns, a string over its letters, and a dictionary over its keys.

    Args:
        given: the container.
        instead_of_table: code for what to pass instead of a table.
        instead_of_mapping: code for what to pass instead of a dictionary.

    Raises:
        TypeError: for anything else, with what to pass instead.
    """
    cure = None
    if isinstance(given, str):
        cure = "one string: put it in a list; a file is read with rd_torch.Fasta(path)"
    elif isinstance(given, Protein) or _is_biopython(given):
        cure = "one: put it in a list"
    elif isinstance(given, bytes | bytearray):
        cure = "bytes: decode them and put the string in a list"
    elif isinstance(given, os.PathLike):
        cure = "a path: read it with rd_torch.Fasta(path) or rd_torch.Proteins(path)"
    elif isinstance(given, io.IOBase):
        cure = "an open file: pass rd_torch.Fasta(path)"
    elif isinstance(given, Mapping):
        cure = f"a mapping: pass {instead_of_mapping}"
    elif isinstance(given, Set) and not isinstance(given, MappingView):
        cure = "a set, which has no order: pass a list"
    elif isinstance(given, Tensor):
        cure = "a tensor: tokens go to the model itself, model(tokens)"
    elif hasattr(given, "columns") or hasattr(given, "column_names"):
        cure = f"a table: pass {instead_of_table}"
    elif isinstance(given, np.ndarray) and (given.ndim != 1 or given.dtype.names):
        cure = f"an array of shape {given.shape}: pass one column of it"
    elif not isinstance(given, Iterable):
        cure = f"{type(given).__name__}: pass {_A_LIST}"
    if cure is not None:
        raise TypeError(f"expected several sequences, got {cure}")


def _is_biopython(given: Any) -> bool:
    """Tell whether something is one sequence or record of Biopython's, which iterates over letters."""
    return type(given).__module__ in ("Bio.Seq", "Bio.SeqRecord")


def _entry(item: Any, number: int) -> Entry:
    """Return the record of an item; `number` counts items from 1."""
    if isinstance(item, Entry):
        return item
    if type(item).__module__ == "Bio.SeqRecord":
        item = (item.id, item.seq)
    if not isinstance(item, tuple | list) or len(item) != 2:
        parts = f" of {len(item)} parts" if isinstance(item, tuple | list) else ""
        raise TypeError(
            f"expected (identifier, sequence) pairs, got {type(item).__name__}{parts} as item number "
            f"{number:,}"
        )
    identifier, sequence = map(_plain_value, item)
    missing = _is_missing(sequence)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | np.integer):
        raise TypeError(
            f"expected a string as identifier, got {type(identifier).__name__} in item number {number:,}"
        )
    fault = f"expected a sequence, got {sequence!r}, which stands for a missing one" if missing else ""
    return Entry(str(identifier), "" if missing else _sequence(sequence, number), "", number, fault)


def _sequence(item: Any, number: int) -> str:
    """Return the sequence of an item; `number` counts items from 1."""
    item = _plain_value(item)
    if isinstance(item, str):
        return str(item)
    if isinstance(item, Protein | Entry):
        return item.sequence
    if isinstance(item, tuple) and len(item) == 2:
        return _sequence(item[1], number)
    if type(item).__module__ == "Bio.SeqRecord":
        item = item.seq
    if type(item).__module__ == "Bio.Seq":
        try:
            return str(item)
        except ValueError as error:  # Biopython has sequences of which it knows the length alone
            raise ValueError(
                f"expected a sequence, got one whose letters are not known as item number {number:,}"
            ) from error
    if _is_missing(item):
        raise TypeError(f"expected a sequence, got {item!r}, a missing one, as item number {number:,}")
    cure = ": decode it" if isinstance(item, bytes) else ""
    raise TypeError(f"expected a sequence, got {type(item).__name__} as item number {number:,}{cure}")


def _plain_value(item: Any) -> Any:
    """Return the Python value of a pyarrow scalar, and anything else as it is."""
    return item.as_py() if hasattr(item, "as_py") else item


def _is_missing(item: Any) -> bool:
    """Tell whether an item is None, NaN, or NA or NaT of pandas."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(item, float | np.floating) and bool(np.isnan(item))
