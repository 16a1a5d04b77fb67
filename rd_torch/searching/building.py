"""`build_index`: from stores to an index, and another store into one that is there."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from rd_torch.disk import move, part_folder, require_folder, take_lock, write_whole
from rd_torch.pooling import pools_of
from rd_torch.searching.config import IndexConfig, Source, checks_file
from rd_torch.searching.index import (
    MEAN_FILE,
    MOST_EXACT,
    ROWS_READ,
    Index,
    checks_of,
    digest_of,
    load_faiss,
    to_units,
)
from rd_torch.searching.recall import measure_recall
from rd_torch.store import Facts, Store, open_store

if TYPE_CHECKING:
    import faiss

CLUSTERS_BY_ROOT: Final = 1
"""Clusters of an approximate index, as a multiple of the square root of the number of proteins."""

TAUGHT_BY_CLUSTER: Final = 64
"""Number of vectors a cluster from which an approximate index learns where clusters lie."""

SAME: Final = 1e-6
"""Share of the largest feature: vectors that differ by no more in any feature count as the same."""

FEW: Final = 20
"""Number of proteins below which their mean says little."""


def build_index(
    stores: Iterable[str | Path] | str | Path, path: str | Path, *, width: int | None = None
) -> Index:
    """Make an index of the proteins of stores, for `search`.

    The index holds the first features of every protein, as directions from the mean over all of them; the
    stores stay where they are. Up to a million proteins, a search compares a query with every one. Beyond,
    proteins lie in clusters, of which the nearest are scanned. How many of the nearest proteins by all
    features the first stage hands on is measured, and stated in `config.recall`; a larger `width` finds more.

    Args:
        stores: files or folders of pooled embeddings that `rd_torch.embed_to_store` wrote with one model.
        path: folder to write. It appears when it is whole.
        width: number of first features that the first stage compares; by default those of the first level.

    Returns:
        The index.

    Raises:
        FileNotFoundError: where there is no store, or no folder for the index.
        FileExistsError: where something is at the path.
        BlockingIOError: where another process writes the same index.
        ValueError: for no stores, or stores without proteins, of other programs, with a vector for each
            residue or several ways to pool, of several models, with NaN, or with an identifier that comes
            twice; for proteins that all have one vector; and for a width that the stores do not have.
        ModuleNotFoundError: where faiss is not installed.

    Warns:
        UserWarning: for fewer than 20 proteins, whose mean says little.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> letters = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIF"
        >>> proteins = [(f"piece {start}", letters[start : start + 15]) for start in range(24)]
        >>> _ = rd_torch.embed_to_store(model, proteins, "pieces.parquet")
        >>> len(rd_torch.build_index("pieces.parquet", "pieces.index"))
        24
    """
    load_faiss()
    folder = Path(path)
    require_folder(folder)
    if folder.exists():
        raise FileExistsError(f"expected nothing at {folder}, got something there: choose another output")
    paths = [stores] if isinstance(stores, str | Path) else list(stores)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_store(each)) for each in paths]
        facts = _require_alike(opened)
        first = facts.widths[0] if width is None else width
        if not 1 <= first <= facts.width:
            raise ValueError(f"expected a width from 1 to {facts.width}, got {first}")
        part = part_folder(folder)
        part.mkdir(exist_ok=True)
        lock = take_lock(part, folder)
        stack.callback(lock.release)
        for left in part.glob("*.*"):  # by a run that was killed; the lock stays
            left.unlink()
        try:
            _fill(part, folder, opened, first)
            _note_recall(part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        move(part, folder)
    return Index(folder)


def _fill(part: Path, folder: Path, stores: list[Store], first: int) -> None:
    """Write the files of an index into a folder that is to be renamed."""
    total = sum(map(len, stores))
    surveys = [survey(store) for store in stores]
    mean = np.sum([each.total for each in surveys], axis=0) / total
    _require_spread(surveys, total)
    write_whole(part / MEAN_FILE, partial(_save, mean))
    vectors = _empty(stores, total, mean[:first])
    sources = []
    for number, (store, each) in enumerate(zip(stores, surveys, strict=True)):
        _add(vectors, store, mean[:first])
        sources.append(_note_source(part, folder, number, store, each.checks))
    assert stores[0].facts is not None
    config = IndexConfig(stores[0].facts, first, total <= MOST_EXACT, digest_of(mean), tuple(sources))
    _write(part, config, vectors)


def add_to_index(path: str | Path, store: str | Path) -> Index:
    """Add the proteins of another store to an index.

    The mean stays what it was, so that similarities do not change. An exact index stays exact.

    Args:
        path: the folder of the index.
        store: file or folder of embeddings of the same model, made in the same way.

    Returns:
        The index, opened anew.

    Raises:
        FileNotFoundError: where there is no index or no store.
        BlockingIOError: where another process adds to the same index.
        ValueError: for a store of another model, or made in another way, or that has an identifier which the
            index has already.
    """
    with ExitStack() as stack:
        IndexConfig.read(Path(path))
        stack.callback(take_lock(Path(path), Path(path)).release)
        index, added = stack.enter_context(Index(path)), stack.enter_context(open_store(store))
        config = index.config
        _require_alike([added]).require_same(config.facts, index.path)
        known = set(index.identifiers)
        if twice := next((name for name in added.identifiers if name in known), None):
            raise ValueError(f"expected identifiers that {index.path} does not have yet, got {twice!r}")
        surveyed = survey(added)
        _add(index.vectors, added, index.mean[: config.first_width])
        source = _note_source(index.path, index.path, len(config.sources), added, surveyed.checks)
        _write(index.path, replace(config, sources=(*config.sources, source), recall=None), index.vectors)
        _note_recall(index.path)
    return Index(path)


def _require_alike(stores: list[Store]) -> Facts:
    """Return the facts of stores; refuse those that cannot be searched, or not together."""
    if not stores:
        raise ValueError("expected a store to index, got none")
    for store in stores:
        if store.facts is None:
            raise ValueError(f"expected a store that rd_torch wrote, got another program's: {store.path}")
        if len(pools_of(store.pool)) != 1:
            got = "a vector for each residue" if store.pool == "none" else f"vectors by {store.pool}"
            raise ValueError(
                f"expected a store of one vector for each protein, got {got} in {store.path}: embed with one "
                "way to pool, such as mean"
            )
        if not len(store):
            raise ValueError(f"expected a store with proteins, got none in {store.path}")
        store.facts.require_same(stores[0].facts or store.facts, stores[0].path)
    names = pa.chunked_array([pa.array(store.identifiers, pa.string()) for store in stores])
    if names.length() > len(names.unique()):
        counts = names.value_counts()
        twice = counts.field("values")[int(np.argmax(counts.field("counts")))].as_py()
        raise ValueError(f"expected each identifier once, got {twice!r} several times")
    assert stores[0].facts is not None
    return stores[0].facts


class Survey(NamedTuple):
    """What one pass over a store's vectors tells.

    Attributes:
        total: `(width,)` their sum in float64.
        low: `(width,)` the smallest value of each feature.
        high: `(width,)` the largest.
        checks: a check of each.
    """

    total: np.ndarray
    low: np.ndarray
    high: np.ndarray
    checks: np.ndarray


def survey(store: Store) -> Survey:
    """Read all vectors of a store once; refuse those that are not finite."""
    total, checks = np.zeros(store.width), np.zeros(len(store), np.uint64)
    low, high = np.full(store.width, np.inf), np.full(store.width, -np.inf)
    for start, block in _blocks(store):
        finite = np.isfinite(block).all(1)
        if not finite.all():
            name = store.identifiers[start + int(np.argmin(finite))]
            raise ValueError(f"expected finite vectors, got NaN or infinity at {name!r} in {store.path}")
        total += block.sum(0, dtype=np.float64)
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        checks[start : start + len(block)] = checks_of(block)
    return Survey(total, low, high, checks)


def _blocks(store: Store, width: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield places and the `(rows, width)` vectors from there on, some at a time."""
    for start in range(0, len(store), ROWS_READ):
        yield start, np.asarray(store.read(slice(start, start + ROWS_READ), width=width))


def _require_spread(surveys: list[Survey], total: int) -> None:
    """Refuse proteins of one vector, which have no directions; warn of few, whose mean says little."""
    low = np.min([each.low for each in surveys], axis=0)
    high = np.max([each.high for each in surveys], axis=0)
    if (high - low).max() <= SAME * max(np.abs(low).max(), np.abs(high).max()):
        raise ValueError(
            f"expected proteins whose vectors differ, got one vector for all of {total:,}: similarities are "
            "taken from the mean, and these lie at it"
        )
    if total < FEW:
        warnings.warn(
            "similarities are taken from the mean of the indexed proteins, which is little known from "
            f"{total}: index {FEW} or more",
            stacklevel=4,
        )


def _empty(stores: list[Store], total: int, mean: np.ndarray) -> faiss.Index:
    """Return vectors of the first stage that nothing is in yet, clusters known where there are some."""
    faiss = load_faiss()
    if total <= MOST_EXACT:
        return faiss.IndexFlatIP(len(mean))
    clusters = int(CLUSTERS_BY_ROOT * total**0.5)
    step = max(1, total // (TAUGHT_BY_CLUSTER * clusters))
    found = faiss.index_factory(len(mean), f"IVF{clusters},Flat", faiss.METRIC_INNER_PRODUCT)
    blocks = (block[::step] for store in stores for _, block in _blocks(store, width=len(mean)))
    found.train(np.concatenate([to_units(block, mean).astype(np.float32) for block in blocks]))
    return found


def _add(vectors: faiss.Index, store: Store, mean: np.ndarray) -> None:
    """Add the first features of a store's proteins."""
    for _, block in _blocks(store, width=len(mean)):
        vectors.add(to_units(block, mean).astype(np.float32))


def _note_source(part: Path, folder: Path, number: int, store: Store, checks: np.ndarray) -> Source:
    """Write the checks of a store's vectors, and describe it as a source of the index in a folder."""
    write_whole(part / checks_file(number), partial(_save, checks))
    return Source.of(store, folder, digest_of(checks))


def _save(array: np.ndarray, path: Path) -> None:
    """Write an array under just this name."""
    with path.open("wb") as handle:
        np.save(handle, array)


def _note_recall(folder: Path) -> None:
    """Measure how many of the nearest proteins the first stage hands on, and state it in the config."""
    with Index(folder) as index:
        replace(index.config, recall=measure_recall(index)).write(folder)


def _write(folder: Path, config: IndexConfig, vectors: Any) -> None:
    """Write vectors under a name of their own, then the config that names them; remove earlier ones."""
    faiss = load_faiss()
    write_whole(folder / config.vectors_file, lambda part: faiss.write_index(vectors, str(part)))
    config.write(folder)
    for other in folder.glob("first-*.faiss"):
        if other.name != config.vectors_file:
            other.unlink()
