"""Parquet: pooled embeddings in a folder of tables, with a column for what each level adds."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rd_torch.disk import write_whole
from rd_torch.pooling import POOLS, VARIANT_POOLS, pools_of
from rd_torch.store.facts import Facts
from rd_torch.store.format import Format, Row
from rd_torch.store.store import Array, Store, missing_message
from rd_torch.store.windows import Length, Window

ROWS_PER_GROUP: Final = 512
"""Number of records that are read together when one of them is asked for."""


class Parquet(Format):
    """A folder of parquet files and nothing else: one file for each window, in FASTA order.

    The columns are `identifier`, `length` in residues (null where nobody counted them), and for each level a
    column of its name with the features that it adds, as lists of fixed size. So in any engine the columns of
    the first levels are the embedding of a shorter chain. Where there are several ways to pool, the columns
    of one follow those of another and are called `mean:28K` and so on. The metadata of each file have the
    facts under `rd_torch`, and under `checksum` that of all records up to the end of the file.
    """

    name = "parquet"
    dtypes = ("float32", "float16")
    pools = POOLS
    variant_pools = VARIANT_POOLS
    in_parts = True

    @staticmethod
    def key(name: str) -> str:
        """Return the name itself."""
        return name

    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """Write one file for the window."""
        path = folder / f"part-{window.number:06d}.parquet"
        write_whole(path, partial(pq.write_table, table_of(window, rows, facts), **_WRITING))
        return [path]

    def finish(self, folder: Path, records: Iterable[tuple[str, Path]], facts: Facts, checksum: str) -> Path:
        """Return the folder of the windows, as it is."""
        return folder

    @staticmethod
    def claims(path: Path) -> bool:
        """Whether it is a folder with parquet files in it."""
        return any(path.glob("*.parquet"))

    def open(self, path: Path) -> Store:
        """Open a folder that this class wrote."""
        return ParquetStore(path)


_WRITING: Final = {
    "row_group_size": ROWS_PER_GROUP,
    "compression": "none",  # which makes floating-point numbers no smaller
    "use_dictionary": False,
    "write_statistics": ["identifier", "length"],
}


def table_of(window: Window[Any], rows: Iterable[Row], facts: Facts) -> pa.Table:
    """Return the table of a window's embeddings, in FASTA order."""
    ordered = sorted(rows, key=lambda row: row[0])
    places = [place for place, _ in ordered]
    vectors = (
        torch.stack([row for _, row in ordered]).numpy() if ordered else np.zeros((0, facts.boundaries[-1]))
    )
    vectors = vectors.astype(facts.save_dtype, copy=False)
    columns: dict[str, pa.Array] = {
        "identifier": pa.array([window.names[place] for place in places], pa.string()),
        "length": pa.array([window.lengths[place] for place in places], pa.int32()),
    }
    pools = pools_of(facts.pool)
    for pool, start in zip(pools, facts.boundaries, strict=False):
        block = vectors[:, start : start + facts.width]
        for level, column in level_columns(block, facts.levels, facts.widths).items():
            columns[column_name(level, pool, pools)] = column
    metadata = {"rd_torch": facts.to_json(), "checksum": window.checksum}
    return pa.table(columns).replace_schema_metadata(metadata)


def column_name(level: str, pool: str, pools: Sequence[str]) -> str:
    """Return the name of a column: the level's, with the way to pool before it where there are several."""
    return level if len(pools) == 1 else f"{pool}:{level}"


def level_columns(vectors: np.ndarray, levels: Sequence[str], widths: Sequence[int]) -> dict[str, pa.Array]:
    """Cut vectors into the features that each level adds.

    Args:
        vectors: `(rows, width)` embeddings.
        levels: names of the levels, smallest first.
        widths: number of features up to the end of each level.

    Returns:
        A column of lists of fixed size for each level, by its name.
    """
    blocks = zip(levels, (0, *widths), widths, strict=False)
    return {
        level: pa.FixedSizeListArray.from_arrays(pa.array(vectors[:, start:end].ravel()), end - start)
        for level, start, end in blocks
    }


class ParquetStore(Store):
    """A folder of parquet files that this package wrote."""

    facts: Facts

    def _open(self) -> None:
        paths = sorted(self._home.glob("part-*.parquet"))
        if not paths:
            raise ValueError(f"expected a folder of part-*.parquet files, got none in {self.path}")
        # Files are open while they are read: a large store has more than a process may hold open. Their
        # footers are kept, because reading one takes more than reading a column of narrow features.
        footers = [pq.read_metadata(each) for each in paths]
        metadata = footers[-1].metadata or {}
        if b"rd_torch" not in metadata:
            raise ValueError(f"expected parquet files of rd_torch, got others in {self.path}")
        self.facts = Facts.from_json(metadata[b"rd_torch"].decode())
        self.checksum = metadata[b"checksum"].decode()
        self.width, self.model_name, self.layer = self.facts.width, self.facts.model, self.facts.num_layers
        self.pool = self.facts.pool
        self._files = list(zip(paths, footers, strict=True))
        # Each row group with its file, and the place of its first record in the store.
        self._groups = [
            (file, group) for file, footer in enumerate(footers) for group in range(footer.num_row_groups)
        ]
        sizes = [footers[file].row_group(group).num_rows for file, group in self._groups]
        self._starts = list(accumulate(sizes, initial=0))

    @cached_property
    def identifiers(self) -> list[str]:
        """Names of the records, in FASTA order."""
        return self._column("identifier")

    def lengths(self, key: slice = slice(None)) -> list[Length]:
        """Read how many residues records have, from the column of lengths."""
        self._require_open()
        return self._all_lengths[key]

    @cached_property
    def _all_lengths(self) -> list[Length]:
        """The column of lengths."""
        return self._column("length")

    def _column(self, name: str) -> list[Any]:
        """Read a whole column."""
        self._require_open()
        values: list[Any] = []
        for path, footer in self._files:
            with pq.ParquetFile(path, metadata=footer) as file:
                values += file.read([name])[0].to_pylist()
        return values

    @cached_property
    def _places(self) -> dict[str, int]:
        """The place of each record, by identifier."""
        return {identifier: place for place, identifier in enumerate(self.identifiers)}

    def __len__(self) -> int:
        return self._starts[-1]

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._places

    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        for key in keys:
            if isinstance(key, str) and key not in self._places:
                raise KeyError(missing_message(key, self.path))
        places = [self._places[key] if isinstance(key, str) else key for key in keys]
        groups = [bisect.bisect_right(self._starts, place) - 1 for place in places]
        rows: dict[int, Array] = {}
        # Groups are read one after the other, and rows are copied out: memory holds one group beside them.
        for group, chosen in groupby(sorted(range(len(places)), key=groups.__getitem__), groups.__getitem__):
            block = self._group(group, width)
            rows |= {number: block[places[number] - self._starts[group]].copy() for number in chosen}
        return [rows[number] for number in range(len(places))]

    def _group(self, number: int, width: int) -> np.ndarray:
        """Read the first features of the records of a row group, and no column beyond them."""
        width, pools = min(width, self.width), pools_of(self.pool)
        place, group = self._groups[number]
        starts = [0, *self.facts.widths]
        levels = [level for level, start in zip(self.facts.levels, starts, strict=False) if start < width]
        names = [[column_name(level, pool, pools) for level in levels] for pool in pools]
        path, footer = self._files[place]
        with pq.ParquetFile(path, metadata=footer) as file:
            read = file.read_row_group(group, columns=[name for each in names for name in each])
        blocks = [
            np.concatenate([_numbers(read, name) for name in each], axis=1)[:, :width] for each in names
        ]
        return np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]

    def _shut(self) -> None:
        """Nothing is open between reads."""


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of lists as an array `(rows, features)`."""
    return table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
