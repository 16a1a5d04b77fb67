"""HDF5 as UniProt ships embeddings: one dataset a protein, named by its identifier."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from math import gcd
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from torch import Tensor

from rd_torch.store.facts import Facts, Pool
from rd_torch.store.format import Array, Format, Row, Store, missing, written_whole
from rd_torch.store.naming import dataset_name, identifier_of
from rd_torch.store.windows import Window

LEAST_COLUMNS: Final = 16
"""Features a chunk holds at the least: thinner ones cost more in bookkeeping than they save."""

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
    pools = ("mean", "none")

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
                    _add(file, dataset_name(window.names[place]), row, columns(facts.widths))

        written_whole(path, fill)
        return [path]

    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """One file of all windows."""
        attributes = asdict(facts) | {"width": facts.width, "facts": facts.to_json(), "checksum": checksum}
        whole = folder.with_name("finished.h5")
        written_whole(whole, partial(_merge, names, attributes))
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
            yield file
        if disk.error is not None:
            raise disk.error


def columns(widths: Sequence[int]) -> int:
    """Columns of a chunk: the greatest number that divides all widths, 16 at the least."""
    return min(max(gcd(*widths), LEAST_COLUMNS), widths[-1])


def _add(file: h5py.File, name: str, row: Tensor, chunk: int) -> None:
    array = row.numpy()
    chunks = (len(array), chunk) if array.ndim == 2 else None
    file.create_dataset(name, data=array, chunks=chunks)


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


class HDF5Store(Store):
    """An HDF5 file, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path)
        except OSError as error:
            raise ValueError(f"expected an HDF5 file, got {path}, which cannot be read: {error}") from error
        attributes = self._file.attrs
        self.facts = Facts.from_json(attributes["facts"]) if "facts" in attributes else None
        self.checksum = attributes.get("checksum")
        self.pool: Pool = "mean"
        self.width = 0
        if self.facts is not None:
            self.pool, self.width = self.facts.pool, self.facts.width
        else:
            self._look(path)

    def _look(self, path: Path) -> None:
        """Takes width and pooling from the first dataset of a file that does not say them."""
        first = next(iter(self._file.values()), None)
        if not isinstance(first, h5py.Dataset) or first.ndim not in (1, 2):
            raise ValueError(f"expected one dataset a protein, of 1 or 2 dimensions, in {path}, got {first}")
        self.pool, self.width = ("mean", "none")[first.ndim - 1], first.shape[-1]

    @cached_property
    def identifiers(self) -> list[str]:
        """Names of the records, in FASTA order."""
        if not self.facts:
            return list(self._others)
        names: list[bytes] = []  # which h5py itself gives by name before 3.16
        self._file.id.links.iterate(names.append, idx_type=h5py.h5.INDEX_CRT_ORDER)
        return [identifier_of(name.decode()) for name in names]

    @cached_property
    def _others(self) -> dict[str, str]:
        """Datasets of another program by identifier, escaped as ours are or not at all."""
        names = list(self._file)
        found = dict(zip(map(identifier_of, names), names, strict=True))
        return found if len(found) == len(names) else dict(zip(names, names, strict=True))

    def __contains__(self, identifier: object) -> bool:
        return isinstance(identifier, str) and (
            dataset_name(identifier) in self._file if self.facts else identifier in self._others
        )

    def _name(self, identifier: str) -> str:
        """The dataset of an identifier, whether it is there or not."""
        return dataset_name(identifier) if self.facts else self._others.get(identifier, ".")

    def _rows(self, keys: Sequence[str] | range, width: int) -> list[Array]:
        if isinstance(keys, range):
            keys = [self.identifiers[place] for place in keys]
        return [self._row(identifier, width) for identifier in keys]

    def _row(self, identifier: str, width: int) -> np.ndarray:
        dataset = self._file.get(self._name(identifier))
        if not isinstance(dataset, h5py.Dataset):
            raise missing(identifier, self.path)
        return dataset[..., :width]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
