"""HDF5 as UniProt ships embeddings: one dataset for each protein, named by its identifier."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from torch import Tensor

from rd_torch.disk import write_whole
from rd_torch.pooling import POOLS, VARIANT_POOLS
from rd_torch.store.facts import Facts
from rd_torch.store.format import Format, Row
from rd_torch.store.hdf5_store import LENGTH, MODEL_NAME, ORIGINAL_ID, HDF5Store
from rd_torch.store.naming import dataset_name
from rd_torch.store.store import Store
from rd_torch.store.windows import Window

LEAST_COLUMNS: Final = 16
"""Number of features that a chunk holds at least: thinner chunks cost more in bookkeeping than they save."""

_CACHED_METADATA: Final = 2**19
"""Bytes of its bookkeeping that HDF5 keeps in memory of a file that is being written.

HDF5 counts them as they are on disk; in memory they take twenty times as much. A larger number makes
writing no faster.
"""

_CREATE: Final[Mapping[str, Any]] = {"libver": ("v110", "v110"), "track_order": True}
"""How files are created: readable for HDF5 1.10 and later, and with the order of the records kept."""


class HDF5(Format):
    """A file with one dataset for each protein: `(width,)`, or `(residues, width)` in chunks of some columns.

    The columns of a chunk divide the widths of the levels, so that to read a level is to read its part of the
    file alone. Each window is a file of its own, which is closed and renamed before the next one begins. The
    whole file is copied together from them under another name, closed and renamed. So nothing that is whole
    is ever open for writing. While the file is copied together it takes its space twice.
    """

    name = "h5"
    dtypes = ("float32", "float16")
    pools = (*POOLS, "none")
    variant_pools = VARIANT_POOLS

    @staticmethod
    def key(name: str) -> str:
        """Return the name of the record's dataset."""
        return dataset_name(name)

    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """Write one file for the window."""
        path = folder / f"{window.number:06d}.h5"

        def fill(part: Path) -> None:
            """Add the rows as they come."""
            with _create(part) as file:
                for place, row in rows:
                    dataset = _add(file, window.names[place], row, chunk_columns(facts.widths))
                    length = window.lengths[place]
                    if facts.pool != "none" and length is not None:
                        _write_attribute(dataset, LENGTH, np.int64(length), h5py.h5t.NATIVE_INT64)

        write_whole(path, fill)
        return [path]

    def finish(self, folder: Path, records: Iterable[tuple[str, Path]], facts: Facts, checksum: str) -> Path:
        """Copy all windows into one file."""
        known = {name: value for name, value in asdict(facts).items() if value not in (None, ())}
        attributes = known | {"width": facts.width, "facts": facts.to_json(), "checksum": checksum}
        attributes[MODEL_NAME] = facts.model
        attributes["boundaries"] = facts.boundaries
        whole = folder.with_name("finished.h5")
        write_whole(whole, partial(_merge, records, attributes))
        return whole

    @staticmethod
    def claims(path: Path) -> bool:
        """Whether it is a file: asked after every other format that is a file."""
        return path.is_file()

    def open(self, path: Path) -> Store:
        """Open a file of this layout, of another program too."""
        return HDF5Store(path)


class _Disk(io.FileIO):
    """A file that keeps the first error of writing to it, and from then on only pretends to write.

    HDF5 cannot close a file when writing fails, and complains until the process ends.

    Attributes:
        error: the first error, if any; whoever closes the file raises it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the data."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


@contextmanager
def _create(path: Path) -> Iterator[h5py.File]:
    """Create an HDF5 file; an error of the disk is raised when the file is closed."""
    with _Disk(path) as disk:
        with h5py.File(disk, "w", **_CREATE) as file:
            cache = file.id.get_mdc_config()
            cache.set_initial_size = True
            cache.initial_size = cache.min_size = cache.max_size = _CACHED_METADATA
            file.id.set_mdc_config(cache)
            yield file
        if disk.error is not None:
            raise disk.error


def chunk_columns(widths: Sequence[int]) -> int:
    """Return the number of columns of a chunk: the greatest common divisor of the widths, but 16 at least."""
    return min(max(gcd(*widths), LEAST_COLUMNS), widths[-1])


def _add(file: h5py.File, name: str, row: Tensor, chunk: int) -> h5py.Dataset:
    """Add the embedding of a record, in chunks of so many columns, with its name."""
    array = row.numpy()
    chunks = (len(array), chunk) if array.ndim == 2 else None
    dataset = file.create_dataset(dataset_name(name), data=array, chunks=chunks)
    text = np.array(name.replace("\x00", "%00"), dtype=object)  # HDF5 would end the text at a zero byte
    _write_attribute(dataset, ORIGINAL_ID, text, _TEXT)
    return dataset


_TEXT: Final = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
_ONE: Final = h5py.h5s.create(h5py.h5s.SCALAR)


def _write_attribute(dataset: h5py.Dataset, name: str, value: Any, kind: Any) -> None:
    """Write an attribute by HDF5's own calls, once for each record: h5py's way takes twice as long."""
    h5py.h5a.create(dataset.id, name.encode(), kind, _ONE).write(np.asarray(value))


def _merge(records: Iterable[tuple[str, Path]], attributes: Mapping[str, Any], part: Path) -> None:
    """Copy records from the files of their windows into one file with attributes."""
    with _create(part) as whole:
        whole.attrs.update(attributes)
        source: h5py.File | None = None
        for name, path in records:
            if source is None or source.filename != str(path):
                if source is not None:
                    source.close()
                source = h5py.File(path)
            source.copy(dataset_name(name), whole)
        if source is not None:
            source.close()
