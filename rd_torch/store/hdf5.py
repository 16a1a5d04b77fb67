"""HDF5 as UniProt ships embeddings: one dataset a protein, named by its identifier."""

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
from rd_torch.pooling import POOLS
from rd_torch.store.facts import Facts
from rd_torch.store.format import Format, Row
from rd_torch.store.hdf5_store import LENGTH, MODEL_NAME, ORIGINAL_ID, HDF5Store
from rd_torch.store.naming import dataset_name
from rd_torch.store.store import Store
from rd_torch.store.windows import Window

LEAST_COLUMNS: Final = 16
"""Features a chunk holds at the least: thinner ones cost more in bookkeeping than they save."""

_CACHED_METADATA: Final = 2**19
"""Bytes of HDF5's bookkeeping that a file which is being written keeps in memory.

HDF5 counts them as on disk; in memory they take twenty times as much. More makes writing no faster.
"""

_CREATE: Final[Mapping[str, Any]] = {"libver": ("v110", "v110"), "track_order": True}


class HDF5(Format):
    """A file with one dataset a protein: `(width,)`, or `(residues, width)` in chunks of a few columns.

    Columns of a chunk divide the level's widths, so that reading a level reads its part of the file alone.
    Every window is a file of its own, closed and renamed before the next begins; the finished file is
    copied together from them under another name, closed, and renamed. So nothing that is finished is ever
    open for writing. While it is being finished the store takes its space twice.
    """

    name = "h5"
    dtypes = ("float32", "float16")
    pools = (*POOLS, "none")

    @staticmethod
    def key(name: str) -> str:
        """Names of datasets."""
        return dataset_name(name)

    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """One file a window."""
        path = folder / f"{window.number:06d}.h5"

        def fill(part: Path) -> None:
            """Adds the rows as they come."""
            with _created(part) as file:
                for place, row in rows:
                    dataset = _add(file, window.names[place], row, columns(facts.widths))
                    length = window.lengths[place]
                    if facts.pool != "none" and length is not None:
                        _note(dataset, LENGTH, np.int64(length), h5py.h5t.NATIVE_INT64)

        write_whole(path, fill)
        return [path]

    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """One file of all windows."""
        said = {name: value for name, value in asdict(facts).items() if value is not None}
        attributes = said | {"width": facts.width, "facts": facts.to_json(), "checksum": checksum}
        attributes[MODEL_NAME] = facts.model
        attributes["boundaries"] = facts.boundaries
        whole = folder.with_name("finished.h5")
        write_whole(whole, partial(_merge, names, attributes))
        whole.replace(path)

    def open(self, path: Path) -> Store:
        """Reads any file of this layout, of other programs too."""
        return HDF5Store(path)


class _Disk(io.FileIO):
    """A file that keeps the first error of writing to it, and from then on only pretends to write.

    HDF5 cannot close a file when writing fails; it complains until the process ends.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of it."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Sets the size."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


@contextmanager
def _created(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file; what the disk says is raised when the file is closed."""
    with _Disk(path) as disk:
        with h5py.File(disk, "w", **_CREATE) as file:
            cache = file.id.get_mdc_config()
            cache.set_initial_size = True
            cache.initial_size = cache.min_size = cache.max_size = _CACHED_METADATA
            file.id.set_mdc_config(cache)
            yield file
        if disk.error is not None:
            raise disk.error


def columns(widths: Sequence[int]) -> int:
    """Columns of a chunk: the greatest number that divides all widths, 16 at the least."""
    return min(max(gcd(*widths), LEAST_COLUMNS), widths[-1])


def _add(file: h5py.File, name: str, row: Tensor, chunk: int) -> h5py.Dataset:
    array = row.numpy()
    chunks = (len(array), chunk) if array.ndim == 2 else None
    dataset = file.create_dataset(dataset_name(name), data=array, chunks=chunks)
    said = np.array(name.replace("\x00", "%00"), dtype=object)  # HDF5 would end at a zero byte
    _note(dataset, ORIGINAL_ID, said, _TEXT)
    return dataset


_TEXT: Final = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
_ONE: Final = h5py.h5s.create(h5py.h5s.SCALAR)


def _note(dataset: h5py.Dataset, name: str, value: Any, kind: Any) -> None:
    """Writes an attribute by HDF5's own calls: h5py's way takes twice as long, once for every record."""
    h5py.h5a.create(dataset.id, name.encode(), kind, _ONE).write(np.asarray(value))


def _merge(names: Iterable[tuple[str, Path]], attributes: Mapping[str, Any], part: Path) -> None:
    with _created(part) as whole:
        whole.attrs.update(attributes)
        source: h5py.File | None = None
        for name, place in names:
            if source is None or source.filename != str(place):
                if source is not None:
                    source.close()
                source = h5py.File(place)
            source.copy(dataset_name(name), whole)
        if source is not None:
            source.close()
