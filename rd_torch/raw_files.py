"""`RawFiles`: files of raw embeddings that are read together, record by record."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from rd_torch.matching import origin_of, require_names, require_raw
from rd_torch.modules import bytes_of
from rd_torch.store import Names, Record, Store, Window, gather, open_store
from rd_torch.threads import run_ahead

Raw: TypeAlias = dict[str, Tensor]
"""The raw embeddings of one record, by level: `(width,)` or `(residues, width)`."""

BATCH_BYTES: Final = 2**23
"""Number of bytes of raw embeddings, as float32, that are computed with together; more go no faster."""

BATCHES_PER_WINDOW: Final = 16
"""Number of such batches in a window of records, which is done, and after a kill found again, as one."""

WINDOWS_AHEAD: Final = 1
"""Number of windows of records that are read while one is computed with."""

RECORDS_READ: Final = 512
"""Number of pooled records that are read at once; records with a row a residue are read one by one."""

KIND: Final = "embeddings"
"""What the records hold, as errors call it."""


class RawFiles:
    """Files of raw embeddings that are read together, in the order of the first one.

    Args:
        stores: the open files by level, at least one, each of which `require_raw` lets pass.

    Attributes:
        widths: width of the embeddings by level.
        pool: `"mean"` for files of means over residues, `"none"` for files of a row for each residue.
        windows: how all files cut long sequences into pieces, which is the option `windows` of `embed`.
        final_norm: whether backbones' final LayerNorm acted on hidden layers, as files of ours state it.
        origins: by level, what the file states of the model that made it, as `origin_of` returns it.

    Raises:
        ValueError: for files that do not fit each other.
    """

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self._stores = stores
        self.widths = {level: store.width for level, store in stores.items()}
        self.origins = {level: origin_of(store) for level, store in stores.items()}
        self._first, *others = stores.values()
        self.pool = self._first.pool
        if others:
            for store in stores.values():
                require_names(store)
        for other in others:
            self._require_same_records(other)
        self.windows = self._find_windows()
        self.final_norm = self._find_norm()

    @property
    def rows_per_batch(self) -> int:
        """Number of rows of all levels that are computed with together."""
        return max(1, BATCH_BYTES // (sum(self.widths.values()) * torch.float32.itemsize))

    @property
    def dtype(self) -> str:
        """Dtypes in which the backbones ran or, of files that do not say it, those of their numbers."""
        return ", ".join(sorted(set(map(_dtype_of, self._stores.values()))))

    def _find_windows(self) -> tuple[int, int] | None:
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

    def _find_norm(self) -> bool:
        """Return whether the final LayerNorm acted on hidden layers; True where no file states it."""
        facts = {level: store.facts for level, store in self._stores.items() if store.facts is not None}
        norms = {level: each.final_norm for level, each in facts.items() if each.final_norm is not None}
        if len(set(norms.values())) > 1:
            listed = ", ".join(
                f"{'with' if norm else 'without'} it at level {level}" for level, norm in norms.items()
            )
            raise ValueError(
                f"expected hidden layers all with the final LayerNorm or all without it, got them {listed}"
            )
        return next(iter(norms.values()), True)

    def records(self) -> Iterator[Record[Raw]]:
        """Read all records.

        Yields:
            Each record, in the order of the first file.

        Raises:
            ValueError: for a record whose embeddings do not fit its level or each other.
        """
        pooled = self.pool == "mean"
        identifiers, lengths = list(self._first.identifiers), self._first.lengths() if pooled else []
        step = RECORDS_READ if pooled else 1
        for start in range(0, len(identifiers), step):
            names = identifiers[start : start + step]
            read = {level: store.tensors(names) for level, store in self._stores.items()}
            for place, name in enumerate(names):
                raw = {level: rows[place] for level, rows in read.items()}
                self._require_fitting(name, raw)
                rows = count_rows(raw)
                yield Record(
                    name, raw, lengths[start + place] if pooled else rows, rows, _digest_input(name, raw)
                )

    def read(self, rows_per_batch: int, names: Names | None = None) -> Generator[Window[Raw], None, None]:
        """Read all records in windows, some of which are read by a thread ahead of their use.

        The thread must end, by `close` of what is returned, before the files are closed.

        Args:
            rows_per_batch: number of rows that are computed with together; a window is 16 times as large.
            names: gives records that share an identifier names of their own; without it they keep the
                identifier.

        Returns:
            The windows; `records` says what they raise.
        """
        size = BATCHES_PER_WINDOW * rows_per_batch
        return run_ahead(gather(self.records(), size, names, KIND), WINDOWS_AHEAD)

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
        pooled = self.pool == "mean"
        residues = count_rows(raw)
        for level, rows in raw.items():
            width, path = self.widths[level], self._stores[level].path
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


@contextmanager
def open_raw(
    inputs: Mapping[str, str | Path], require: Callable[[str, Store], None] = require_raw
) -> Iterator[RawFiles]:
    """Open files of raw embeddings, and close them at the end.

    Args:
        inputs: by level, a file or folder that `open_store` reads.
        require: function that raises a ValueError for a file that cannot be of a level, given the level's
            name and the file.

    Yields:
        The files.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for files that do not fit their levels or each other.
    """
    with ExitStack() as opened:
        stores = {level: opened.enter_context(open_store(path)) for level, path in inputs.items()}
        for level, store in stores.items():
            require(level, store)
        yield RawFiles(stores)


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


def count_rows(raw: Raw) -> int:
    """Return the number of vectors in a record: one, or one for each residue."""
    first = next(iter(raw.values()))
    return 1 if first.ndim == 1 else len(first)


def cut_batches(contents: Sequence[Raw], most: int) -> Iterator[list[int]]:
    """Cut records into batches.

    Args:
        contents: raw embeddings of each record.
        most: number of rows at which a batch ends.

    Yields:
        The places of the records of a batch: so many that they have `most` rows or more.
    """
    places: list[int] = []
    rows = 0
    for place, raw in enumerate(contents):
        places.append(place)
        rows += count_rows(raw)
        if rows >= most:
            yield places
            places, rows = [], 0
    if places:
        yield places
