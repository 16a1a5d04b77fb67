"""Stores and indexes of chosen proteins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import rd_torch
from rd_torch.searching import Index
from rd_torch.store import Record, Row, Store, Window, Work, format_of, gather

RECORDS_AT_ONCE = 512
"""Number of records that are copied together."""


def write_part(store: Store, names: Iterable[str], path: Path) -> None:
    """Write a store of some records of another one, with the same facts.

    Args:
        store: The other store, pooled, which this package wrote.
        names: Identifiers of the records, in the order that they will have.
        path: The store to write.
    """
    assert store.facts is not None, "a store of this package"
    lengths = dict(zip(store.identifiers, store.lengths(), strict=True))
    records = (Record(name, name, lengths[name], 1, [name.encode()]) for name in names)

    def copy(window: Window[str], _: dict[int, str]) -> Iterator[list[Row]]:
        """Read the embeddings of a window from the other store."""
        yield list(enumerate(store.tensors(window.names)))

    with Work(path, format_of(path), store.facts) as work:
        work.fill(gather(records, RECORDS_AT_ONCE, None, "records"), copy, lambda count, before: None, len)


@contextmanager
def index_of(store: Store, names: Sequence[str] | None = None, width: int | None = None) -> Iterator[Index]:
    """Make an index in a folder that is removed afterwards.

    Args:
        store: The store to index.
        names: Identifiers of the records to index; None for all of them.
        width: Number of first features that the first stage compares; by default those of the first level.

    Yields:
        The index.
    """
    with TemporaryDirectory() as folder:
        path = store.path
        if names is not None:
            path = Path(folder) / "part.parquet"
            write_part(store, names, path)
        with rd_torch.build_index(path, Path(folder) / "part.index", width=width) as index:
            yield index
