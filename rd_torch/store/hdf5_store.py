"""`HDF5Store`: HDF5 files of ours and of other programs, open for reading."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import h5py
import numpy as np

from rd_torch.store.facts import Facts
from rd_torch.store.naming import dataset_name, identifier_of
from rd_torch.store.store import Array, Store, missing
from rd_torch.store.windows import Length

ORIGINAL_ID: Final = "original_id"
"""The attribute of a dataset that has the protein's name, for bio_embeddings, biotrainer and the ProtTrans
releases."""

MODEL_NAME: Final = "model_name"
"""The attribute of a file that has the model's name, for ProtSpace."""

LENGTH: Final = "length"
"""The attribute of a dataset that has the protein's residues, where somebody counted them."""


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

    def _look(self) -> tuple[str, int]:
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
            ValueError: where some datasets say their protein's name and others do not, or two say the same.
        """
        names: list[str] = []
        said: list[str | None] = []

        def note(name: bytes, kind: Any) -> None:
            """Keeps the names of a dataset; by HDF5's own calls, for there may be a million."""
            if kind.type == h5py.h5o.TYPE_DATASET:
                names.append(name.decode())
                said.append(_original_id(self._file, name) if kind.num_attrs else None)

        h5py.h5o.visit(self._file.id, note, info=True)
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
                f"none at {names[said.index(None)]!r}"
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

    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        names = (key if isinstance(key, str) else self.identifiers[key] for key in keys)
        return [self._row(name, width) for name in names]

    def _row(self, identifier: str, width: int) -> np.ndarray:
        dataset = self._file.get(self._name(identifier))
        if not isinstance(dataset, h5py.Dataset):
            raise missing(identifier, self.path)
        fits = _is_embedding(dataset) and (dataset.ndim == 2) == (self.pool == "none")
        columns = self._columns(width)
        if not fits or dataset.shape[-1] != self.width * len(columns):
            raise ValueError(
                f"{_LAYOUT} in {self.path}, got {identifier!r} of {dataset.dtype} {dataset.shape} beside "
                f"others of {'residues x ' if self.pool == 'none' else ''}{self.width * len(columns)}"
            )
        if len(columns) == 1:
            return dataset[..., columns[0]]
        whole = dataset[()]
        return np.concatenate([whole[each] for each in columns])

    def _shut(self) -> None:
        self._file.close()


_LAYOUT: Final = (
    "expected one dataset a protein, of floating-point numbers of 1 or 2 dimensions and one width,"
)


def _original_id(file: h5py.File, name: bytes) -> str | None:
    """The protein's name that a dataset states, if it does."""
    if not h5py.h5a.exists(file.id, ORIGINAL_ID.encode(), obj_name=name):
        return None
    attribute = h5py.h5a.open(file.id, ORIGINAL_ID.encode(), obj_name=name)
    value = np.empty(attribute.shape, attribute.dtype)
    attribute.read(value)
    return _text(value)


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
