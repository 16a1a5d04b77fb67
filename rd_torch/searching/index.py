"""`Index`: the first features of the proteins of stores, in a form that is scanned fast."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from safetensors.numpy import load_file

from rd_torch.searching.config import IndexConfig
from rd_torch.store import Store, open_store

if TYPE_CHECKING:
    import faiss

MEAN_FILE: Final = "mean.safetensors"
MEAN: Final = "mean"

ROWS_READ: Final = 4_096
"""Number of vectors that are read from a store at once."""

CLUSTERS_SCANNED: Final = 64
"""Number of clusters that an approximate index scans for each query."""


class Index:
    """An index of the proteins of stores: where each lies by its first features.

    Proteins have places: those of the first store come first, in FASTA order. The stores stay where they
    are, and the second stage reads them. `add` adds another store.

    Args:
        path: the folder of the index.

    Attributes:
        path: the folder of the index.
        config: what it is of.

    Raises:
        FileNotFoundError: where there is no index, or a store of it is not where it was.
        ValueError: for anything but an index, and a store that has changed.
        ModuleNotFoundError: where faiss is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = IndexConfig.read(self.path)
        self._vectors = read_vectors(self.path / self.config.vectors)
        self.mean: np.ndarray = load_file(self.path / MEAN_FILE)[MEAN]
        self._open = ExitStack()
        self._stores: dict[int, Store] = {}
        self._starts = list(accumulate((source.records for source in self.config.sources), initial=0))
        for number in range(len(self.config.sources)):
            self._store(number)

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def identifiers(self) -> list[str]:
        """Names of the proteins, by place."""
        numbers = range(len(self.config.sources))
        return [name for number in numbers for name in self._store(number).identifiers]

    def _store(self, number: int) -> Store:
        """Open a store, once, and hold it against what the index says of it."""
        if number not in self._stores:
            source = self.config.sources[number]
            beside = self.path / source.beside
            path = beside if beside.exists() else Path(source.path)
            if not path.exists():
                raise FileNotFoundError(
                    f"expected the store that {self.path} was made of at {source.path}, got nothing there: "
                    "move it back, or index it anew"
                )
            store = self._open.enter_context(open_store(path))
            if (store.checksum, len(store)) != (source.checksum, source.records):
                raise ValueError(
                    f"expected {path} to have the records that {self.path} was made of, got others: "
                    "index it anew"
                )
            if store.facts is None:
                raise ValueError(f"expected a store of rd_torch's at {path}, got another program's")
            store.facts.require_same(self.config.facts, self.path)
            self._stores[number] = store
        return self._stores[number]

    def first(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the proteins whose first features are the most similar.

        Args:
            queries: `(queries, first_width)` first features, as they were embedded.
            count: number of proteins to find for each.

        Returns:
            `(queries, count)` similarities, falling, and places; -1 for the place where there is no more.
        """
        units = to_units(queries, self.mean[: self.config.first_width])
        return search_vectors(self._vectors, units, min(count, len(self)))

    def first_among(
        self, queries: np.ndarray, count: int, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the most similar proteins among some; arguments and result are else those of `first`.

        Args:
            queries: `(queries, first_width)` first features.
            count: number of proteins to find for each.
            places: places of the proteins that may be found.
        """
        units = to_units(queries, self.mean[: self.config.first_width])
        return search_vectors(self._vectors, units, min(count, len(places)), places)

    def rows(self, places: Sequence[int] | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read whole vectors from the stores, some at a time.

        Args:
            places: places of proteins, rising.

        Yields:
            Places, and their `(rows, width)` vectors.
        """
        for number, group in groupby(map(int, places), lambda place: bisect_right(self._starts, place) - 1):
            mine = np.fromiter(group, int)
            for start in range(0, len(mine), ROWS_READ):
                part = mine[start : start + ROWS_READ]
                yield part, self._store(number).read(part - self._starts[number])  # type: ignore[misc]  # arrays

    def close(self) -> None:
        """Close the stores."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_index(path: str | Path) -> Index:
    """Open an index that `build_index` or `rd-torch index` wrote.

    Args:
        path: the folder of the index.

    Returns:
        The index.

    Raises:
        FileNotFoundError: where there is no index, or a store of it is not where it was.
        ValueError: for anything but an index, and a store that has changed.
        ModuleNotFoundError: where faiss is not installed.
    """
    return Index(path)


def to_units(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the directions of vectors from a mean, of length 1, in float32; zeros for one at the mean.

    Args:
        vectors: `(rows, width)`.
        mean: `(width,)` in float64.
    """
    centred = vectors - mean
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0).astype(np.float32)


def load_faiss() -> Any:
    """Return faiss; raise a ModuleNotFoundError where it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected faiss to search with, got none: pip install rd_torch[search]"
        ) from error
    return faiss


def read_vectors(path: Path) -> faiss.Index:
    """Read the vectors of the first stage."""
    try:
        found = load_faiss().read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"expected the vectors of an index in {path}, got a file that is broken") from error
    if hasattr(found, "nprobe"):
        found.nprobe = CLUSTERS_SCANNED
    return found


def search_vectors(
    vectors: faiss.Index, units: np.ndarray, count: int, places: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return similarities and places of the nearest vectors, among some places or all."""
    faiss = load_faiss()
    if places is None:
        return vectors.search(units, count)
    selector = faiss.IDSelectorBatch(places)
    if isinstance(vectors, faiss.IndexIVF):
        return vectors.search(
            units, count, params=faiss.SearchParametersIVF(sel=selector, nprobe=CLUSTERS_SCANNED)
        )
    return vectors.search(units, count, params=faiss.SearchParameters(sel=selector))
