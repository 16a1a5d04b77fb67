"""`Conversions`: a store in the containers of other libraries, which are loaded when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from rd_torch.pooling import pools_of
from rd_torch.store.facts import Facts

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame


class Readable(Protocol):
    """What conversions ask of a store; `Store` describes it."""

    facts: Facts | None
    width: int
    pool: str

    @property
    def identifiers(self) -> Sequence[str]:
        """Names of the records."""

    def read(self, key: Any, *, width: int | None = None, as_torch: bool = False) -> Any:
        """Read the embeddings of records."""

    def lengths(self, key: slice = slice(None)) -> list[int | None]:
        """Read how many residues records have."""

    def __len__(self) -> int: ...


class Conversions:
    """A store's ways into the containers of other libraries."""

    def to_dataframe(self: Readable, *, width: int | None = None) -> DataFrame:
        """Read all embeddings into a DataFrame of pandas.

        Args:
            width: number of features, from the first on, for each way to pool; by default all.

        Returns:
            A frame with a row for each record, called by its identifier, and a column for each feature, such
            as `mean0`; without pooling a row for each residue, called by identifier and position, from 1.

        Raises:
            ModuleNotFoundError: where pandas is not installed.
            ValueError: for a width that the store does not have.

        Examples:
            >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
            >>> _ = rd_torch.embed_to_store(model, [("one", "MQIFVK"), ("two", "MKV")], "proteins.h5")
            >>> rd_torch.open_store("proteins.h5").to_dataframe(width=48).shape
            (2, 48)
        """
        pandas = require_library("pandas")
        columns = _names(self, width)
        if self.pool != "none":
            return pandas.DataFrame(self.read(slice(None), width=width), list(self.identifiers), columns)
        rows = cast(list[np.ndarray], self.read(slice(None), width=width))
        pairs = [
            (identifier, place)
            for identifier, each in zip(self.identifiers, rows, strict=True)
            for place in range(1, len(each) + 1)
        ]
        index = pandas.MultiIndex.from_tuples(pairs, names=["identifier", "position"])
        matrix = np.concatenate(rows) if rows else np.zeros((0, len(columns)), np.float32)
        return pandas.DataFrame(matrix, index, columns)

    def to_anndata(self: Readable, *, width: int | None = None) -> AnnData:
        """Read all vectors of a pooled store into an AnnData object, as scanpy takes it.

        Args:
            width: number of features, from the first on, for each way to pool; by default all.

        Returns:
            An object with a record in each row of `X`. `obs` has the lengths of records where they are known,
            `var` the level that adds each feature, and `uns["rd_torch"]` the facts of the store, as JSON.

        Raises:
            ModuleNotFoundError: where anndata is not installed.
            ValueError: for a store of a vector for each residue, and a width that the store does not have.
        """
        if self.pool == "none":
            raise ValueError("expected a pooled store, got one of a vector a residue: pool it by mean first")
        anndata, pandas = require_library("anndata"), require_library("pandas")
        obs = pandas.DataFrame(index=list(self.identifiers))
        lengths = self.lengths()
        if None not in lengths:
            obs["length"] = lengths
        names = _names(self, width)
        var = pandas.DataFrame(index=names)
        facts = self.facts
        if facts is not None:
            level = np.repeat(facts.levels, list(facts.added.values()))[: width or self.width]
            var["level"] = np.tile(level, len(pools_of(self.pool)))
        uns = {} if facts is None else {"rd_torch": json.dumps(asdict(facts))}
        return anndata.AnnData(np.asarray(self.read(slice(None), width=width)), obs, var, uns)

    def as_torch_dataset(
        self: Readable, labels: Mapping[str, Any] | None = None, *, width: int | None = None
    ) -> StoreDataset:
        """Return the store as a data set of tensors, with labels where they are given.

        Nothing is read now. A `DataLoader` reads what a batch needs, with any number of workers.

        Args:
            labels: a label for each identifier that the data set shall have; by default it has every record,
                without a label.
            width: number of features, from the first on, for each way to pool; by default all.

        Returns:
            A data set of tensors, or of pairs of tensor and label, in FASTA order.

        Raises:
            KeyError: for a label of an identifier that is not in the store.
            ValueError: for no labels.
        """
        return StoreDataset(self, labels, width)


class StoreDataset(Dataset[Any]):
    """The embeddings of a store as tensors, with labels where they are given.

    Attributes:
        store: the store.
        identifiers: identifiers of the items, in order.
        labels: the label of each; None without labels.
        width: number of features, for each way to pool; None for all.
    """

    def __init__(self, store: Readable, labels: Mapping[str, Any] | None, width: int | None) -> None:
        self.store, self.width = store, width
        self.identifiers = list(store.identifiers)
        self.labels: list[Any] | None = None
        if labels is not None:
            known = set(self.identifiers)
            unknown = [name for name in labels if name not in known]
            if unknown:
                raise KeyError(
                    f"expected labels of records in the store, got {len(unknown):,} of others: {unknown[0]!r}"
                )
            self.identifiers = [name for name in self.identifiers if name in labels]
            self.labels = [labels[name] for name in self.identifiers]
            if not self.labels:
                raise ValueError("expected a label for some record of the store, got none")

    def __len__(self) -> int:
        return len(self.identifiers)

    def __getitem__(self, place: int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        """Return several items at once, as a `DataLoader` asks for them."""
        names = [self.identifiers[place] for place in places]
        rows: Sequence[Tensor] = list(self.store.read(names, width=self.width, as_torch=True))
        if self.labels is None:
            return list(rows)
        return [(row, self.labels[place]) for row, place in zip(rows, places, strict=True)]


def require_library(name: str) -> Any:
    """Import a library that conversions need.

    Args:
        name: its name.

    Returns:
        Its module.

    Raises:
        ModuleNotFoundError: where it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected {name} to convert a store, got none: pip install rd_torch[frames]"
        ) from error


def _names(store: Readable, width: int | None) -> list[str]:
    """Return the names of the features: the way to pool and a number, from 0."""
    places = range(store.width if width is None else width)
    return [f"{way}{place}" for way in pools_of(store.pool) or ("residue",) for place in places]
