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
from rd_torch.store.format import Format, Row, written_whole
from rd_torch.store.naming import dataset_name, identifier_of
from rd_torch.store.store import Array, Store, missing
from rd_torch.store.windows import Length, Window

LEAST_COLUMNS: Final = 16
"""Features a chunk holds at the least: thinner ones cost more in bookkeeping than they save."""

ORIGINAL_ID: Final = "original_id"
"""The attribute of a dataset that has the protein's name, for bio_embeddings, biotrainer and the ProtTrans
releases."""

MODEL_NAME: Final = "model_name"
"""The attribute of a file that has the model's name, for ProtSpace."""

LENGTH: Final = "length"
"""The attribute of a dataset that has the protein's residues, where somebody counted them."""

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
                    dataset = _add(file, window.names[place], row, columns(facts.widths))
                    if window.lengths[place] is not None:
                        dataset.attrs[LENGTH] = window.lengths[place]

        written_whole(path, fill)
        return [path]

    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """One file of all windows."""
        said = {name: value for name, value in asdict(facts).items() if value is not None}
        attributes = said | {"width": facts.width, "facts": facts.to_json(), "checksum": checksum}
        attributes[MODEL_NAME] = facts.model
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


def _add(file: h5py.File, name: str, row: Tensor, chunk: int) -> h5py.Dataset:
    array = row.numpy()
    chunks = (len(array), chunk) if array.ndim == 2 else None
    dataset = file.create_dataset(dataset_name(name), data=array, chunks=chunks)
    dataset.attrs[ORIGINAL_ID] = name.replace("\x00", "%00")  # HDF5 would end there
    return dataset


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
    """An HDF5 file, open for reading: ours, or another program's with one dataset a protein.

    In files of other programs a protein's name is the attribute `original_id` of its dataset, and where there
    is none the dataset's own name, with the groups that it lies in.
    """

    def _open(self) -> None:
        try:
            self._file = h5py.File(self._home)
        except OSError as error:
            raise ValueError(
                f"expected an HDF5 file, got {self.path}, which cannot be read: {error}"
            ) from error
        attributes = self._file.attrs
        self.facts = Facts.from_json(attributes["facts"]) if "facts" in attributes else None
        self.checksum = attributes.get("checksum")
        self.model_name, self.layer = _text(attributes.get(MODEL_NAME)), None
        if self.facts is not None:
            self.pool, self.width, self.layer = self.facts.pool, self.facts.width, self.facts.num_layers
            self.model_name = self.facts.model
        else:
            self.pool, self.width = self._look()

    def _look(self) -> tuple[Pool, int]:
        """Pooling and width of a file that does not say them: those of its first dataset."""
        first: Any = self._file
        while isinstance(first, h5py.Group):
            first = next(iter(first.values()), None)
        if not _is_embedding(first):
            got = "none" if first is None else f"{first.name.lstrip('/')!r} of {first.dtype} {first.shape}"
            self._file.close()
            raise ValueError(f"{_LAYOUT} in {self.path}, got {got}")
        return ("mean", "none")[first.ndim - 1], first.shape[-1]

    @cached_property
    def identifiers(self) -> list[str]:
        """Names of the records, in FASTA order."""
        if not self.facts:
            return list(self._others)
        self._require_open()
        names: list[bytes] = []  # which h5py itself gives by name before 3.16
        self._file.id.links.iterate(names.append, idx_type=h5py.h5.INDEX_CRT_ORDER)
        return [self._named(name.decode()) for name in names]

    def _named(self, name: str) -> str:
        """The identifier of one of our datasets; stores of earlier versions say it by the name alone."""
        if "~" not in name:  # nothing was left out of it
            return identifier_of(name)
        return _text(self._file[name].attrs.get(ORIGINAL_ID)) or identifier_of(name)

    @cached_property
    def _others(self) -> dict[str, str]:
        """Datasets of another program by identifier.

        Raises:
            ValueError: for a dataset of another kind or width than the first; where some datasets say their
                protein's name and others do not, or two say the same.
        """
        names: list[str] = []
        said: list[str | None] = []

        def note(name: str, each: h5py.Dataset | h5py.Group) -> None:
            """Keeps the names of a dataset."""
            if isinstance(each, h5py.Dataset):
                fits = _is_embedding(each) and (each.ndim == 2) == (self.pool == "none")
                if not fits or each.shape[-1] != self.width:
                    raise ValueError(
                        f"{_LAYOUT} in {self.path}, got {name!r} of {each.dtype} {each.shape} beside "
                        "others of "
                        f"{'' if self.pool == 'mean' else 'residues x '}{self.width}"
                    )
                names.append(name)
                said.append(_text(each.attrs.get(ORIGINAL_ID)))

        self._file.visititems(note)
        known = [name for name in said if name is not None]
        if len(set(known)) < len(known):
            twice = max(known, key=known.count)
            raise ValueError(
                f"expected a name for each protein in {self.path}, got the attribute {ORIGINAL_ID} "
                f"{twice!r} twice"
            )
        if known and len(known) < len(names):
            raise ValueError(
                f"expected the attribute {ORIGINAL_ID} at every dataset of {self.path} or at none, got "
                "none at "
                f"{names[said.index(None)]!r}"
            )
        found = dict(zip(known or map(identifier_of, names), names, strict=True))
        return found if len(found) == len(names) else dict(zip(names, names, strict=True))

    def _length_of(self, identifier: str) -> Length:
        length = self._file[self._name(identifier)].attrs.get(LENGTH)
        return None if length is None else int(length)

    def __contains__(self, identifier: object) -> bool:
        self._require_open()
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

    def _shut(self) -> None:
        self._file.close()


_LAYOUT: Final = (
    "expected one dataset a protein, of floating-point numbers of 1 or 2 dimensions and one width,"
)


def _is_embedding(dataset: Any) -> bool:
    """Whether a dataset can be a vector, or a vector a residue."""
    return isinstance(dataset, h5py.Dataset) and dataset.ndim in (1, 2) and dataset.dtype.kind == "f"


def _text(value: Any) -> str | None:
    """An attribute as text, which some write as bytes or in an array of one; None where there is none."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value is None else str(value)
