"""`Index`: the first features of the proteins of stores, in a form that is scanned fast."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from rd_torch.searching.config import IndexConfig, Source, checks_file
from rd_torch.store import Length, Store, open_store

if TYPE_CHECKING:
    import faiss

MEAN_FILE: Final = "mean.npy"

ROWS_READ: Final = 4_096
"""Number of vectors that are read from a store at once."""

MOST_EXACT: Final = 1_000_000
"""Number of proteins up to which the first stage compares each query with every one of them."""

CLUSTERS_SCANNED: Final = 64
"""Number of clusters that an approximate index scans for each query."""


class Index:
    """An index of the proteins of stores: where each lies by its first features.

    Proteins have places: those of the first store come first, in FASTA order. The stores stay where they
    are, and the second stage reads them. `add_to_index` adds another store.

    Args:
        path: the folder of the index.

    Attributes:
        path: the folder of the index.
        config: what it is of.
        mean: `(width,)` mean that vectors are taken from, in float64.
        vectors: the first features as faiss holds them.

    Raises:
        FileNotFoundError: where there is no index, or a store of it is not where it was.
        ValueError: for anything but an index, and a store that has changed.
        ModuleNotFoundError: where faiss is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = IndexConfig.read(self.path)
        self.mean = self._read_mean()
        self.vectors = read_vectors(self.path, self.config)
        self._open = ExitStack()
        self._stores = [self._open_store(source) for source in self.config.sources]
        self._checks: dict[int, np.ndarray] = {}
        self._starts = list(accumulate((source.records for source in self.config.sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def _read_mean(self) -> np.ndarray:
        """Read the mean that vectors are taken from."""
        mean: np.ndarray = np.load(self.path / MEAN_FILE)
        if digest_of(mean) != self.config.mean:
            raise ValueError(f"expected the mean that {self.path} was made with, got another one in it")
        return mean

    @property
    def identifiers(self) -> list[str]:
        """Names of the proteins, by place."""
        return [name for store in self._stores for name in store.identifiers]

    def identifier(self, place: int) -> str:
        """Return the name of the protein at a place."""
        number = self._number(place)
        return self._stores[number].identifiers[place - self._starts[number]]

    def length(self, place: int) -> Length:
        """Return the number of residues of the protein at a place; None where nobody counted them."""
        number = self._number(place)
        local = place - self._starts[number]
        return self._stores[number].lengths(slice(local, local + 1))[0]

    def _number(self, place: int) -> int:
        """Return the number of the store that has a place."""
        return bisect_right(self._starts, place) - 1

    def _open_store(self, source: Source) -> Store:
        """Open a store, and hold it against what the index says of it."""
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
                f"expected {path} to have the records that {self.path} was made of, got others: index it anew"
            )
        if store.facts is None:
            raise ValueError(f"expected a store of rd_torch's at {path}, got another program's")
        store.facts.require_same(self.config.facts, self.path)
        return store

    def first(
        self, queries: np.ndarray, count: int, places: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the proteins whose first features are the most similar.

        Args:
            queries: `(queries, first_width)` first features, as they were embedded.
            count: number of proteins to find for each.
            places: places of the proteins that may be found; by default all.

        Returns:
            `(queries, count)` similarities, falling, and places; -1 for the place where there is no more.
        """
        units = to_units(queries, self.mean[: self.config.first_width]).astype(np.float32)
        if places is None:
            return search_vectors(self.vectors, units, min(count, len(self)))
        chosen = np.zeros(len(self), bool)
        chosen[places] = True
        return search_vectors(self.vectors, units, min(count, len(places)), chosen)

    def rows(self, places: Sequence[int] | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read whole vectors from the stores, some at a time.

        Args:
            places: places of proteins, rising.

        Yields:
            Places, and their `(rows, width)` vectors.

        Raises:
            ValueError: for vectors that are not those that the index was made of.
        """
        for number, group in groupby(map(int, places), self._number):
            mine = np.fromiter(group, int)
            for start in range(0, len(mine), ROWS_READ):
                part = mine[start : start + ROWS_READ]
                vectors = np.asarray(self._stores[number].read(part - self._starts[number]))
                self._require_same(number, part, vectors)
                yield part, vectors

    def _require_same(self, number: int, places: np.ndarray, vectors: np.ndarray) -> None:
        """Hold vectors of a store against the checks that were taken when the index was made."""
        if number not in self._checks:
            self._checks[number] = np.load(self.path / checks_file(number), mmap_mode="r")
        same = self._checks[number][places - self._starts[number]] == checks_of(vectors)
        if not same.all():
            name = self.identifier(int(places[np.argmin(same)]))
            raise ValueError(
                f"expected the vectors of {self._stores[number].path} that {self.path} was made of, got "
                f"another one for {name!r}: index it anew"
            )

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

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> letters = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIF"
        >>> proteins = [(f"piece {start}", letters[start : start + 15]) for start in range(24)]
        >>> _ = rd_torch.embed_to_store(model, proteins, "pieces.parquet")
        >>> rd_torch.build_index("pieces.parquet", "pieces.index").close()
        >>> with rd_torch.open_index("pieces.index") as index:
        ...     print(len(index), index.config.first_width)
        24 32
    """
    return Index(path)


def to_units(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the directions of vectors from a mean, of length 1, in float64; zeros for one at the mean.

    Args:
        vectors: `(rows, width)`.
        mean: `(width,)` in float64.
    """
    centred = vectors - mean
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)


def checks_of(vectors: np.ndarray) -> np.ndarray:
    """Return a number for each vector that is another one if any of its features changes.

    Args:
        vectors: `(rows, width)`, in float32 or narrower.

    Returns:
        `(rows,)` sums of the features' bits, each times an odd number of its own, modulo 2^64.
    """
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32).astype(np.uint64)
    return bits @ (np.random.PCG64(0).random_raw(bits.shape[1]) | np.uint64(1))


def digest_of(array: np.ndarray) -> str:
    """Return a digest of the numbers of an array."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def load_faiss() -> Any:
    """Return faiss; raise a ModuleNotFoundError where it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected faiss to search with, got none: pip install rd_torch[search]"
        ) from error
    return faiss


def read_vectors(folder: Path, config: IndexConfig) -> faiss.Index:
    """Read the vectors of the first stage of an index."""
    path = folder / config.vectors_file
    try:
        found = load_faiss().read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"expected the vectors of an index in {path}, got a file that is broken") from error
    expected = (sum(source.records for source in config.sources), config.first_width)
    if (found.ntotal, found.d) != expected:
        raise ValueError(f"expected vectors {expected} in {path}, got {(found.ntotal, found.d)}")
    if hasattr(found, "nprobe"):
        found.nprobe = CLUSTERS_SCANNED
    return found


def search_vectors(
    vectors: faiss.Index, units: np.ndarray, count: int, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return similarities and places of the nearest vectors, among those that are chosen or all."""
    faiss = load_faiss()
    if chosen is None:
        return vectors.search(units, count)
    selector = faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
    if isinstance(vectors, faiss.IndexIVF):
        clusters = vectors.nlist if chosen.sum() <= MOST_EXACT else CLUSTERS_SCANNED
        return vectors.search(units, count, params=faiss.SearchParametersIVF(sel=selector, nprobe=clusters))
    return vectors.search(units, count, params=faiss.SearchParameters(sel=selector))
