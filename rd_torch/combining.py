"""Nest raw embeddings that lie in files, without a transformer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from rd_torch.matching import require_names, require_raw
from rd_torch.modules import bytes_of
from rd_torch.nesting import Nesting
from rd_torch.store import (
    Facts,
    Names,
    ProgressCallback,
    Record,
    Row,
    SaveDtype,
    Store,
    Window,
    Work,
    format_of,
    gather,
    open_store,
)
from rd_torch.threads import run_ahead

Raw: TypeAlias = dict[str, Tensor]
"""The raw embeddings of one record, by level: `(width,)` or `(residues, width)`."""

BATCH_BYTES: Final = 2**23
"""Number of bytes of raw embeddings, as float32, that are nested together; more go no faster."""

BATCHES_PER_WINDOW: Final = 16
"""Number of such batches in a window of records, which is written, and after a kill found again, as one."""

WINDOWS_AHEAD: Final = 1
"""Number of windows of records that are read while one is nested."""

RECORDS_READ: Final = 512
"""Number of pooled records that are read at once; records with a row a residue are read one by one."""


def combine_stores(
    nesting: Nesting,
    inputs: Mapping[str, str | Path],
    path: str | Path,
    *,
    width: int | None = None,
    form: str | None = None,
    save_dtype: SaveDtype = "float32",
    progress: ProgressCallback = lambda records, before: None,
) -> None:
    """Nest raw embeddings that lie in files, and write them to a store; no backbone runs.

    Records are matched by identifier, and keep the order of the first file. They are read window by window,
    so that memory does not grow with their number. The same call after a kill goes on where it was: it reads
    the inputs again from the start, compares them with what was read before, and nests what is missing.

    Args:
        nesting: config and maps of the chain; `Nesting.from_pretrained` reads them.
        inputs: by level, a file or folder that `open_store` reads. It holds the raw final embeddings of that
            level's backbone; all files hold means over residues, or all hold a row for each residue.
        path: the store; its suffix names the format.
        width: number of features to keep; files of levels that are not needed for them may be left out, and
            are not opened. By default all features of the levels in `inputs`.
        form: `"h5"`, `"parquet"` or `"pt"`, in place of the suffix.
        save_dtype: type of the numbers in the store; only `"pt"` takes bfloat16.
        progress: function that is called with a number of records that are done, and with True if an earlier
            run did them, else False.

    Raises:
        FileNotFoundError: if a file, or the folder of `path`, is not there.
        BlockingIOError: if another process writes the same store.
        ValueError: for levels that are not the family's first; for files that do not fit their level or each
            other; for a width, dtype or format that does not exist; and for a store that was begun with other
            embeddings, another model or other choices.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K")
        >>> for level, backbone in model.backbones.items():  # raw embeddings, as people have them
        ...     alone = rd_torch.RDModel({level: backbone}, [])
        ...     _ = rd_torch.embed_to_store(alone, [("one", "MQIFVK"), ("two", "MKV")], f"{level}.h5")
        >>> nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini", level="90K")
        >>> rd_torch.combine_stores(nesting, {"28K": "28K.h5", "90K": "90K.h5"}, "nested.h5")
        >>> rd_torch.open_store("nested.h5")["one"].shape
        (48,)
    """
    levels = nesting.config.first_levels(inputs, width)
    nesting = nesting.until(levels[-1])
    with ExitStack() as opened:
        stores = {
            level: opened.enter_context(open_store(inputs[level])) for level in inputs if level in levels
        }
        files = _RawFiles(nesting, stores)
        with Work(Path(path), format_of(path, form), files.facts(width, save_dtype)) as work:
            names = Names(work.format.key)
            size = BATCHES_PER_WINDOW * work.facts.tokens_per_batch
            cut = gather(files.records(), size, names, "embeddings")

            def nest_window(window: Window[Raw], _: dict[int, str]) -> Iterator[list[Row]]:
                """Nest the records of a window, batch by batch."""
                return _nest_batches(nesting, window, work.facts)

            # The thread that reads ahead must end before the files are closed.
            with closing(run_ahead(cut, WINDOWS_AHEAD)) as windows:
                work.fill(windows, nest_window, progress, count=len)
    if names.renamed:
        warnings.warn(
            f"records whose name an earlier record has in {work.format.name}, stored as IDENTIFIER#2 and so "
            f"on: {names.renamed:,}",
            stacklevel=2,
        )


class _RawFiles:
    """Files of raw embeddings that are read together, in the order of the first one.

    Args:
        nesting: config and maps of the chain.
        stores: the open files by level.

    Raises:
        ValueError: for files that do not fit their levels or each other.
    """

    def __init__(self, nesting: Nesting, stores: Mapping[str, Store]) -> None:
        self._nesting, self._stores = nesting, stores
        self._widths = {level.name: level.width for level in nesting.config.levels}
        for level in nesting.config.levels:
            if level.name in stores:
                require_raw(level, stores[level.name])
        self._first, *others = stores.values()
        if others:
            for store in stores.values():
                require_names(store)
        for other in others:
            self._require_same_records(other)

    def facts(self, width: int | None, save_dtype: SaveDtype) -> Facts:
        """State what the nested store holds, as `rd_torch.embedding.facts_of` does for embeddings."""
        config = self._nesting.config
        prefixes = config.prefixes(width or list(config.widths.values())[-1])
        row_bytes = sum(self._widths.values()) * torch.float32.itemsize
        return Facts(
            model=self._nesting.name,
            fingerprint=self._nesting.fingerprint(),
            levels=tuple(prefixes),
            widths=tuple(prefixes.values()),
            num_layers=config.levels[-1].num_layers,
            pool=self._first.pool,
            backbone_dtype=", ".join(sorted(set(map(_dtype_of, self._stores.values())))),
            save_dtype=save_dtype,
            tokens_per_batch=max(1, BATCH_BYTES // row_bytes),
            windows=self._windows(),
        )

    def _windows(self) -> tuple[int, int] | None:
        """Return how all files cut long sequences into pieces, which is the option `windows` of `embed`."""
        by_level = {
            level: store.facts.windows for level, store in self._stores.items() if store.facts is not None
        }
        if len(set(by_level.values())) > 1:
            listed = ", ".join(f"{windows} at level {level}" for level, windows in by_level.items())
            raise ValueError(
                f"expected files of embeddings with the same --windows, got {listed}: embed with one choice"
            )
        return next(iter(by_level.values()), None)

    def records(self) -> Iterator[Record[Raw]]:
        """Read all records.

        Yields:
            Each record, in the order of the first file.

        Raises:
            ValueError: for a record whose embeddings do not fit its level or each other.
        """
        pooled = self._first.pool == "mean"
        identifiers, lengths = list(self._first.identifiers), self._first.lengths() if pooled else []
        step = RECORDS_READ if pooled else 1
        for start in range(0, len(identifiers), step):
            names = identifiers[start : start + step]
            read = {level: store.tensors(names) for level, store in self._stores.items()}
            for place, name in enumerate(names):
                raw = {level: rows[place] for level, rows in read.items()}
                self._require_fitting(name, raw)
                rows = _count_rows(raw)
                yield Record(
                    name, raw, lengths[start + place] if pooled else rows, rows, _digest_input(name, raw)
                )

    def _require_same_records(self, other: Store) -> None:
        """Raise a ValueError unless a file has the records and the pooling of the first one."""
        first = self._first
        if first.pool != other.pool:
            kinds = {"mean": "one vector a protein", "none": "one vector a residue"}
            raise ValueError(
                f"expected {kinds[first.pool]} in every file, as in {first.path}, got {kinds[other.pool]} in "
                f"{other.path}: take files of one kind"
            )
        inside, outside = set(first.identifiers), set(other.identifiers)
        for one, two, alone in ((first, other, inside - outside), (other, first, outside - inside)):
            if alone:
                raise ValueError(
                    f"expected the same identifiers in every file, got {min(alone)!r} in {one.path} but not "
                    f"in {two.path} ({len(alone):,} in all): embed these with every backbone, or leave "
                    "them out of all files"
                )

    def _require_fitting(self, name: str, raw: Raw) -> None:
        """Raise a ValueError for a record whose embeddings do not fit their level or each other."""
        pooled = self._first.pool == "mean"
        residues = _count_rows(raw)
        for level, rows in raw.items():
            width, path = self._widths[level], self._stores[level].path
            fits = rows.ndim == (1 if pooled else 2) and rows.shape[-1] == width
            if not fits or not rows.is_floating_point():
                raise ValueError(
                    f"expected {name!r} in {path} as floating-point numbers of shape "
                    f"{f'({width},)' if pooled else f'(residues, {width})'}, got "
                    f"{str(rows.dtype).removeprefix('torch.')} of shape {tuple(rows.shape)}"
                )
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(f"expected finite numbers, got NaN or infinity for {name!r} in {path}")
            if not pooled and len(rows) != residues:
                raise ValueError(
                    f"expected as many residues of {name!r} in every file, got {residues:,} in "
                    f"{self._first.path} and {len(rows):,} in {path}: embed the same residues with every "
                    "backbone, without special tokens"
                )


def _dtype_of(store: Store) -> str:
    """Return the dtype in which a file's backbone ran or, if the file does not say, that of its numbers."""
    if store.facts is not None:
        return store.facts.backbone_dtype
    (first,) = store.tensors(store.identifiers[:1])
    return str(first.dtype).removeprefix("torch.")


def _digest_input(name: str, raw: Raw) -> Iterator[bytes | memoryview]:
    """Yield what tells a record from any other, for its checksum: its name and every number."""
    yield f"{name}\n".encode()
    for level, rows in sorted(raw.items()):
        yield f"{level} {rows.dtype} {tuple(rows.shape)}\n".encode()
        yield bytes_of(rows)


def _count_rows(raw: Raw) -> int:
    """Return the number of vectors in a record: one, or one for each residue."""
    first = next(iter(raw.values()))
    return 1 if first.ndim == 1 else len(first)


@torch.inference_mode()
def _nest_batches(nesting: Nesting, window: Window[Raw], facts: Facts) -> Iterator[list[Row]]:
    """Nest the records of a window; yield their places and embeddings, as they are saved, in batches."""
    dtype = getattr(torch, facts.save_dtype)
    for places in _cut_batches(window.contents, facts.tokens_per_batch):
        chosen = [window.contents[place] for place in places]
        batch = {level: torch.cat([torch.atleast_2d(raw[level]) for raw in chosen]) for level in chosen[0]}
        nested = nesting.combine(batch)[:, : facts.width].to(dtype)
        parts = nested if facts.pool == "mean" else nested.split([_count_rows(raw) for raw in chosen])
        yield list(zip(places, parts, strict=True))


def _cut_batches(contents: Sequence[Raw], most: int) -> Iterator[list[int]]:
    """Yield the places of records that are nested together: so many that they have `most` rows or more."""
    places: list[int] = []
    rows = 0
    for place, raw in enumerate(contents):
        places.append(place)
        rows += _count_rows(raw)
        if rows >= most:
            yield places
            places, rows = [], 0
    if places:
        yield places
