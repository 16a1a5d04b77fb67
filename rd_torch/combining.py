"""Files of raw embeddings to a store of nested ones, without a transformer."""

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
"""A record's raw embeddings by level, `(width,)` or `(residues, width)`."""

BATCH_BYTES: Final = 2**23
"""Raw embeddings that are nested together, as float32; more go no faster."""

BATCHES_PER_WINDOW: Final = 16

WINDOWS_AHEAD: Final = 1
"""Windows that are read while one is nested."""

RECORDS_READ: Final = 512
"""Pooled records that are read at once."""


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
    """Nests raw embeddings that lie in files, into an embedding file or folder; no backbone runs.

    Records are matched by identifier and keep the order of the first file. They are read in windows, so
    memory does not grow with their number. Called again after a kill it goes on where it was: it reads the
    inputs again from the start, compares as it passes, and nests what is missing.

    Args:
        nesting: config and maps; `Nesting.from_pretrained` reads them.
        inputs: by level, a file or folder that `open_store` reads: the raw final embeddings of that level's
            backbone, all averaged over residues or all residue by residue.
        path: the store; its suffix tells the format.
        width: features to keep; files of levels above the one that holds them may be left out, and are not
            opened. By default all of the levels given.
        form: `"h5"`, `"parquet"` or `"pt"`, in place of the suffix.
        save_dtype: what the store holds; bfloat16 in `"pt"` alone.
        progress: called with records that are done, and whether they were so before.

    Raises:
        FileNotFoundError: when a file, or the store's folder, is not there.
        BlockingIOError: when another process writes the same store.
        ValueError: for levels that are not the family's first, files that do not fit their level or each
            other, a width, dtype or format that does not exist, or a store that was begun with other
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
        files = _Files(nesting, stores)
        with Work(Path(path), format_of(path, form), files.facts(width, save_dtype)) as work:
            names = Names(work.format.key)
            size = BATCHES_PER_WINDOW * work.facts.tokens_per_batch
            cut = gather(files.records(), size, names, "embeddings")

            def nested(window: Window[Raw], _: dict[int, str]) -> Iterator[list[Row]]:
                """The rows of a window, batch by batch."""
                return _nested(nesting, window, work.facts)

            with closing(
                run_ahead(cut, WINDOWS_AHEAD)
            ) as windows:  # which reads no more before files are closed
                work.fill(windows, nested, progress, count=len)
    if names.renamed:
        warnings.warn(
            f"records whose name another one has in {work.format.name}, stored as IDENTIFIER#2 and so on: "
            f"{names.renamed:,}",
            stacklevel=2,
        )


class _Files:
    """Files of raw embeddings that are read together, the first of them in its order.

    Raises:
        ValueError: where they do not fit their levels or each other.
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
            self._require_alike(other)

    def facts(self, width: int | None, save_dtype: SaveDtype) -> Facts:
        """What the nested store will be of."""
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
        """The windows in which long sequences were embedded, which must be those of all files."""
        said = {
            level: store.facts.windows for level, store in self._stores.items() if store.facts is not None
        }
        if len(set(said.values())) > 1:
            listed = ", ".join(f"{windows} at level {level}" for level, windows in said.items())
            raise ValueError(f"expected files of the same --windows, got {listed}: embed with one choice")
        return next(iter(said.values()), None)

    def records(self) -> Iterator[Record[Raw]]:
        """All records in the first file's order.

        Raises:
            ValueError: for one whose embeddings do not fit its level or each other.
        """
        pooled = self._first.pool == "mean"
        identifiers, lengths = list(self._first.identifiers), self._first.lengths() if pooled else []
        step = RECORDS_READ if pooled else 1
        for start in range(0, len(identifiers), step):
            names = identifiers[start : start + step]
            read = {level: store.tensors(names) for level, store in self._stores.items()}
            for place, name in enumerate(names):
                raw = {level: rows[place] for level, rows in read.items()}
                self._check(name, raw)
                rows = _rows(raw)
                yield Record(
                    name, raw, lengths[start + place] if pooled else rows, rows, _digested(name, raw)
                )

    def _require_alike(self, other: Store) -> None:
        """Raises a ValueError unless a file has the first one's records and pooling."""
        first = self._first
        if first.pool != other.pool:
            said = {"mean": "one vector a protein", "none": "one vector a residue"}
            raise ValueError(
                f"expected {said[first.pool]} in every file, as in {first.path}, got {said[other.pool]} in "
                f"{other.path}: take files of one kind"
            )
        inside, outside = set(first.identifiers), set(other.identifiers)
        for one, two, lone in ((first, other, inside - outside), (other, first, outside - inside)):
            if lone:
                raise ValueError(
                    f"expected the same identifiers in every file, got {min(lone)!r} in {one.path} but not "
                    f"in {two.path} ({len(lone):,} such): embed these with every backbone, or leave them out "
                    "of all files"
                )

    def _check(self, name: str, raw: Raw) -> None:
        """Raises a ValueError for a record of another shape than its file's or its other embeddings'."""
        pooled = self._first.pool == "mean"
        residues = _rows(raw)
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
                raise ValueError(f"expected finite numbers, got NaN or infinite ones of {name!r} in {path}")
            if not pooled and len(rows) != residues:
                raise ValueError(
                    f"expected as many residues of {name!r} in every file, got {residues:,} in "
                    f"{self._first.path} and {len(rows):,} in {path}: embed whole sequences, or cut to one "
                    "length, without special tokens"
                )


def _dtype_of(store: Store) -> str:
    """What the backbone of a file ran in, as far as it says so, or else what the file holds."""
    if store.facts is not None:
        return store.facts.backbone_dtype
    (first,) = store.tensors(store.identifiers[:1])
    return str(first.dtype).removeprefix("torch.")


def _digested(name: str, raw: Raw) -> Iterator[bytes | memoryview]:
    """What tells a record from any other: its name and every number."""
    yield f"{name}\n".encode()
    for level, rows in sorted(raw.items()):
        yield f"{level} {rows.dtype} {tuple(rows.shape)}\n".encode()
        yield bytes_of(rows)


def _rows(raw: Raw) -> int:
    """Vectors of a record: one, or one a residue."""
    first = next(iter(raw.values()))
    return 1 if first.ndim == 1 else len(first)


@torch.inference_mode()
def _nested(nesting: Nesting, window: Window[Raw], facts: Facts) -> Iterator[list[Row]]:
    """The rows of a window, as they are saved, in batches."""
    dtype = getattr(torch, facts.save_dtype)
    for places in _batches(window.contents, facts.tokens_per_batch):
        chosen = [window.contents[place] for place in places]
        batch = {level: torch.cat([torch.atleast_2d(raw[level]) for raw in chosen]) for level in chosen[0]}
        nested = nesting.combine(batch)[:, : facts.width].to(dtype)
        parts = nested if facts.pool == "mean" else nested.split([_rows(raw) for raw in chosen])
        yield list(zip(places, parts, strict=True))


def _batches(contents: Sequence[Raw], most: int) -> Iterator[list[int]]:
    """Places of records that are nested together: each batch ends with the one that makes it `most` rows."""
    places: list[int] = []
    rows = 0
    for place, raw in enumerate(contents):
        places.append(place)
        rows += _rows(raw)
        if rows >= most:
            yield places
            places, rows = [], 0
    if places:
        yield places
