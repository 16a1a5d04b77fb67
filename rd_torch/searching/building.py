"""`build_index`: from stores to an index, and another store into one that is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from safetensors.numpy import save_file

from rd_torch.disk import require_folder, write_whole
from rd_torch.model import RDModel
from rd_torch.pooling import pools_of
from rd_torch.searching.config import IndexConfig, Source
from rd_torch.searching.index import (
    MEAN,
    MEAN_FILE,
    ROWS_READ,
    Index,
    load_faiss,
    read_vectors,
    to_units,
)
from rd_torch.store import Facts, Store, open_store

if TYPE_CHECKING:
    import faiss

MOST_EXACT: Final = 1_000_000
"""Number of proteins up to which the first stage compares each query with every one of them."""

CLUSTERS_BY_ROOT: Final = 4
"""Clusters of an approximate index, as a multiple of the square root of the number of proteins."""

TAUGHT_BY_CLUSTER: Final = 64
"""Number of vectors a cluster from which an approximate index learns where clusters lie."""


def build_index(
    stores: Iterable[str | Path] | str | Path,
    path: str | Path,
    *,
    width: int | None = None,
    model: RDModel | None = None,
) -> Index:
    """Make an index of the proteins of stores, for `search`.

    The index holds the first features of every protein, as directions from the mean over all of them; the
    stores stay where they are. Up to a million proteins, a search compares a query with every one. Beyond,
    proteins lie in clusters, of which the nearest are scanned.

    Args:
        stores: files or folders of pooled embeddings that `rd_torch.embed_to_store` wrote with one model.
        path: folder to write.
        width: number of first features that the first stage compares; by default those of the first level.
        model: the model that made the stores. If given, the index notes what part of it the first stage
            needs, so that a search by the first stage alone need not load the rest.

    Returns:
        The index.

    Raises:
        FileNotFoundError: where there is no store, or no folder for the index.
        FileExistsError: where something is at the path.
        ValueError: for no stores, or stores without proteins, of other programs, with a vector for each
            residue or several ways to pool, of several models, with NaN, or that share an identifier; for a
            width that the stores do not have; and for another model than theirs.
        ModuleNotFoundError: where faiss is not installed.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> proteins = [("one", "MQIFVKTLTG"), ("two", "MKWVTFISLL"), ("three", "MQIFVRTLSG")]
        >>> _ = rd_torch.embed_to_store(model, proteins, "proteins.parquet")
        >>> index = rd_torch.build_index("proteins.parquet", "proteins.index")
        >>> [(hit.target, hit.rank) for hit in rd_torch.search(model, [("new", "MQIFVKTLSG")], index, k=1)]
        [('one', 1)]
    """
    load_faiss()
    folder = Path(path)
    require_folder(folder)
    if folder.exists():
        raise FileExistsError(f"expected nothing at {folder}, got something there: choose another output")
    paths = [stores] if isinstance(stores, str | Path) else list(stores)
    opened = [open_store(each) for each in paths]
    facts = _require_alike(opened)
    first = facts.widths[0] if width is None else width
    if not 1 <= first <= facts.width:
        raise ValueError(f"expected a width from 1 to {facts.width}, got {first}")
    mean = _mean_of(opened)
    folder.mkdir()
    write_whole(folder / MEAN_FILE, partial(save_file, {MEAN: mean}))
    total = sum(map(len, opened))
    vectors = _empty(opened, total, mean[:first])
    for store in opened:
        _fill(vectors, store, mean[:first])
    sources = tuple(Source.of(store, folder) for store in opened)
    config = IndexConfig(facts, first, total <= MOST_EXACT, "", sources, {})
    if model is not None:
        config = replace(config, parts=parts_of(model, config))
    _write(folder, config, vectors)
    for store in opened:
        store.close()
    return Index(folder)


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
        ValueError: for a store of another model, or made in another way, or that has an identifier which the
            index has already.
    """
    with Index(path) as index, open_store(store) as added:
        config = index.config
        facts = _require_alike([added])
        facts.require_same(config.facts, index.path)
        known = set(index.identifiers)
        if twice := next((name for name in added.identifiers if name in known), None):
            raise ValueError(f"expected identifiers that {index.path} does not have yet, got {twice!r}")
        _mean_of([added])  # which refuses NaN
        vectors = read_vectors(index.path / config.vectors)
        _fill(vectors, added, index.mean[: config.first_width])
        sources = (*config.sources, Source.of(added, index.path))
        _write(index.path, replace(config, sources=sources), vectors)
    return Index(path)


def parts_of(model: RDModel, config: IndexConfig) -> dict[str, str]:
    """Return the fingerprint of the part of a model that the first stage of an index needs, by its level.

    Raises:
        ValueError: for another model than that of the index.
    """
    require_model(model, config)
    return {config.first_level: model.truncate(config.first_level).fingerprint()}


def require_model(model: RDModel, config: IndexConfig, *, first_alone: bool = False) -> None:
    """Require the model that made the stores of an index.

    Args:
        model: the model.
        config: what the index is of.
        first_alone: whether a part of it that suffices for the first stage will do.

    Raises:
        ValueError: for another model.
    """
    known = {config.facts.fingerprint, *(config.parts.values() if first_alone else ())}
    if model.fingerprint() not in known:
        raise ValueError(
            f"expected the model that made the stores, {config.facts.model or 'of unknown name'}, with "
            f"levels {', '.join(config.facts.levels)} in {config.facts.backbone_dtype}, got another one, or "
            "a part of it"
        )


def _require_alike(stores: list[Store]) -> Facts:
    """Return the facts of stores; refuse those that cannot be searched, or not together."""
    if not stores:
        raise ValueError("expected a store to index, got none")
    names: set[str] = set()
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
        if twice := next((name for name in store.identifiers if name in names), None):
            raise ValueError(f"expected each identifier in one store, got {twice!r} in several")
        names.update(store.identifiers)
    assert stores[0].facts is not None
    return stores[0].facts


def _blocks(store: Store, width: int | None = None) -> Iterator[np.ndarray]:
    """Yield the `(rows, width)` vectors of a store, some at a time, in float64."""
    for start in range(0, len(store), ROWS_READ):
        yield np.asarray(store.read(slice(start, start + ROWS_READ), width=width), np.float64)


def _mean_of(stores: list[Store]) -> np.ndarray:
    """Return the mean over the proteins of stores in float64; refuse vectors that are not finite."""
    total, count = np.zeros(stores[0].width), 0
    for store in stores:
        place = 0
        for block in _blocks(store):
            finite = np.isfinite(block).all(1)
            if not finite.all():
                name = store.identifiers[place + int(np.argmin(finite))]
                raise ValueError(f"expected finite vectors, got NaN or infinity at {name!r} in {store.path}")
            total += block.sum(0)
            place += len(block)
        count += place
    return total / count


def _empty(stores: list[Store], total: int, mean: np.ndarray) -> faiss.Index:
    """Return vectors of the first stage that nothing is in yet, clusters known where there are some."""
    faiss = load_faiss()
    if total <= MOST_EXACT:
        return faiss.IndexFlatIP(len(mean))
    clusters = int(CLUSTERS_BY_ROOT * total**0.5)
    step = max(1, total // (TAUGHT_BY_CLUSTER * clusters))
    found = faiss.index_factory(len(mean), f"IVF{clusters},Flat", faiss.METRIC_INNER_PRODUCT)
    taught = [to_units(block[::step], mean) for store in stores for block in _blocks(store, width=len(mean))]
    found.train(np.concatenate(taught))
    return found


def _fill(vectors: faiss.Index, store: Store, mean: np.ndarray) -> None:
    """Add the first features of a store's proteins."""
    for block in _blocks(store, width=len(mean)):
        vectors.add(to_units(block, mean))


def _write(folder: Path, config: IndexConfig, vectors: Any) -> None:
    """Write vectors under a name of their own, then the config that names them; remove earlier ones."""
    faiss = load_faiss()
    name = f"first-{len(config.sources):06d}.faiss"
    write_whole(folder / name, lambda part: faiss.write_index(vectors, str(part)))
    replace(config, vectors=name).write(folder)
    for other in folder.glob("first-*.faiss"):
        if other.name != name:
            other.unlink()
