"""`HDF5Store`: reads HDF5 files of this package and of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import h5py
import numpy as np

from rd_torch.store.facts import Facts
from rd_torch.store.naming import dataset_name, identifier_of
from rd_torch.store.store import Array, Store, missing_message
from rd_torch.store.windows import Length

ORIGINAL_ID: Final = "original_id"
"""The attribute of a dataset that holds the protein's name, as bio_embeddings, biotrainer and the releases of
ProtTrans have it."""

MODEL_NAME: Final = "model_name"
"""The attribute of a file that holds the model's name, as ProtSpace has it."""

LENGTH: Final = "length"
"""The attribute of a dataset that holds the number of the protein's residues, where somebody counted them."""


class HDF5Store(Store):
    """An HDF5 file with one dataset for each protein, written by this package or by another program.

    In files of other programs a protein is called what the attribute `original_id` of its dataset says. Where
    there is no such attribute it is called what the dataset is called, with the groups that it lies in.
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
            self.pool, self.width = self._infer_layout()

    def _infer_layout(self) -> tuple[str, int]:
        """Infer pooling and width from the first dataset of a file that does not state them."""
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
            return list(self._datasets)
        self._require_open()
        names: list[bytes] = []  # in the order of their making; h5py before 3.16 sorts them by name
        self._file.id.links.iterate(names.append, idx_type=h5py.h5.INDEX_CRT_ORDER)
        return [self._identifier_in(name.decode()) for name in names]

    def _identifier_in(self, name: str) -> str:
        """Return the identifier of our dataset, which in earlier versions is only in its name."""
        if "~" not in name:  # the name was not shortened
            return identifier_of(name)
        return _text(self._file[name].attrs.get(ORIGINAL_ID)) or identifier_of(name)

    @cached_property
    def _datasets(self) -> dict[str, str]:
        """Names of another program's datasets, by identifier.

        Raises:
            ValueError: where some datasets state their protein's name and others do not, or two state the
                same.
        """
        names: list[str] = []
        stated: list[str | None] = []

        def note(name: bytes, kind: Any) -> None:
            """Note the names of a dataset by HDF5's own calls, because there may be a million."""
            if kind.type == h5py.h5o.TYPE_DATASET:
                names.append(name.decode())
                stated.append(_original_id(self._file, name) if kind.num_attrs else None)

        h5py.h5o.visit(self._file.id, note, info=True)
        known = [name for name in stated if name is not None]
        if len(set(known)) < len(known):
            twice = max(known, key=known.count)
            raise ValueError(
                f"expected a name for each protein in {self.path}, got the attribute {ORIGINAL_ID} "
                f"{twice!r} twice"
            )
        if known and len(known) < len(names):
            raise ValueError(
                f"expected the attribute {ORIGINAL_ID} at every dataset of {self.path} or at none, got "
                f"none at {names[stated.index(None)]!r}"
            )
        found = dict(zip(known or map(identifier_of, names), names, strict=True))
        return found if len(found) == len(names) else dict(zip(names, names, strict=True))

    def _length_of(self, identifier: str) -> Length:
        length = self._file[self._name(identifier)].attrs.get(LENGTH)
        return None if length is None else int(length)

    def __contains__(self, identifier: object) -> bool:
        self._require_open()
        return isinstance(identifier, str) and (
            dataset_name(identifier) in self._file if self.facts else identifier in self._datasets
        )

    def _name(self, identifier: str) -> str:
        """Return the name of a record's dataset, or of none where there is no such record."""
        return dataset_name(identifier) if self.facts else self._datasets.get(identifier, ".")

    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        names = (key if isinstance(key, str) else self.identifiers[key] for key in keys)
        return [self._row(name, width) for name in names]

    def _row(self, identifier: str, width: int) -> np.ndarray:
        """Read the first features of one record.

        Args:
            identifier: its identifier.
            width: number of features for each way to pool.

        Returns:
            Its embedding, with the first features of each way to pool one behind the other.

        Raises:
            KeyError: for a record that is not in the file.
            ValueError: for a dataset of another shape than the first one's.
        """
        dataset = self._file.get(self._name(identifier))
        if not isinstance(dataset, h5py.Dataset):
            raise KeyError(missing_message(identifier, self.path))
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
    """Return the protein's name that a dataset states, if it states one."""
    if not h5py.h5a.exists(file.id, ORIGINAL_ID.encode(), obj_name=name):
        return None
    attribute = h5py.h5a.open(file.id, ORIGINAL_ID.encode(), obj_name=name)
    value = np.empty(attribute.shape, attribute.dtype)
    attribute.read(value)
    return _text(value)


def _is_embedding(dataset: Any) -> bool:
    """Whether a dataset can be a vector, or a vector for each residue."""
    return isinstance(dataset, h5py.Dataset) and dataset.ndim in (1, 2) and dataset.dtype.kind == "f"


def _text(value: Any) -> str | None:
    """Return an attribute as text; some programs write it as bytes or in an array of one."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value is None else str(value)
