"""Parquet: pooled embeddings in a folder of files, a column for what each level adds."""

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
from rd_torch.pooling import POOLS, pools_of
from rd_torch.store.facts import Facts
from rd_torch.store.format import Format, Row
from rd_torch.store.store import Array, Store, missing
from rd_torch.store.windows import Length, Window

ROWS_PER_GROUP: Final = 512
"""Records that are read together when one of them is asked for."""


class Parquet(Format):
    """A folder of parquet files and nothing else, one file a window, in FASTA order.

    Columns: `identifier`, `length` in residues (null where nobody counted them), and by the name of each
    level the features that it adds, a list of fixed size. So the first columns are the embedding of a
    shorter chain in any engine. Of several ways to pool there are the columns of one after those of another,
    called `mean:28K` and so on. Each file's metadata has the facts under `rd_torch` and the checksum up to
    its end.
    """

    name = "parquet"
    dtypes = ("float32", "float16")
    pools = POOLS

    @staticmethod
    def key(name: str) -> str:
        """Identifiers as they are."""
        return name

    def write(self, folder: Path, window: Window[Any], rows: Iterable[Row], facts: Facts) -> list[Path]:
        """One file a window."""
        path = folder / f"part-{window.number:06d}.parquet"
        write_whole(path, partial(pq.write_table, table(window, rows, facts), **_WRITING))
        return [path]

    def finish(
        self, folder: Path, names: Iterable[tuple[str, Path]], facts: Facts, checksum: str, path: Path
    ) -> None:
        """The folder of the windows, renamed."""
        folder.replace(path)

    def open(self, path: Path) -> Store:
        """Reads a folder that this class wrote."""
        return ParquetStore(path)


_WRITING: Final = {
    "row_group_size": ROWS_PER_GROUP,
    "compression": "none",  # floats do not get smaller
    "use_dictionary": False,
    "write_statistics": ["identifier", "length"],
}


def table(window: Window[Any], rows: Iterable[Row], facts: Facts) -> pa.Table:
    """The table of a window, in FASTA order."""
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
    """What a level's column is called: of one way to pool as the level is."""
    return level if len(pools) == 1 else f"{pool}:{level}"


def level_columns(vectors: np.ndarray, levels: Sequence[str], widths: Sequence[int]) -> dict[str, pa.Array]:
    """What each level adds to `(rows, width)` vectors, by its name: lists of fixed size."""
    blocks = zip(levels, (0, *widths), widths, strict=False)
    return {
        level: pa.FixedSizeListArray.from_arrays(pa.array(vectors[:, start:end].ravel()), end - start)
        for level, start, end in blocks
    }


class ParquetStore(Store):
    """A folder of parquet files, opened one after the other."""

    facts: Facts

    def _open(self) -> None:
        paths = sorted(self._home.glob("part-*.parquet"))
        if not paths:
            raise ValueError(f"expected a folder of part-*.parquet files, got none in {self.path}")
        self._files = [pq.ParquetFile(each) for each in paths]
        metadata = self._files[-1].schema_arrow.metadata or {}
        if b"rd_torch" not in metadata:
            raise ValueError(f"expected parquet files of rd_torch, got others in {self.path}")
        self.facts = Facts.from_json(metadata[b"rd_torch"].decode())
        self.checksum = metadata[b"checksum"].decode()
        self.width, self.model_name, self.layer = self.facts.width, self.facts.model, self.facts.num_layers
        self.pool = self.facts.pool
        # The first record of each row group, with its file and its number there.
        self._groups = [
            (file, group) for file in self._files for group in range(file.metadata.num_row_groups)
        ]
        sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = list(accumulate(sizes, initial=0))

    @cached_property
    def identifiers(self) -> list[str]:
        """Names of the records, in FASTA order."""
        return [name for file in self._files for name in file.read(["identifier"])[0].to_pylist()]

    def lengths(self, key: slice = slice(None)) -> list[Length]:
        """Residues of the records of a slice, as the files say them."""
        self._require_open()
        return [length for file in self._files for length in file.read(["length"])[0].to_pylist()][key]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {identifier: place for place, identifier in enumerate(self.identifiers)}

    def __len__(self) -> int:
        return self._starts[-1]

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._places

    def _rows(self, keys: Sequence[str | int], width: int) -> list[Array]:
        for key in keys:
            if isinstance(key, str) and key not in self._places:
                raise missing(key, self.path)
        places = [self._places[key] if isinstance(key, str) else key for key in keys]
        groups = [bisect.bisect_right(self._starts, place) - 1 for place in places]
        rows: dict[int, Array] = {}
        # One group after the other, and copies of its rows: no more than a group is held beside them.
        for group, chosen in groupby(sorted(range(len(places)), key=groups.__getitem__), groups.__getitem__):
            block = self._group(group, width)
            rows |= {number: block[places[number] - self._starts[group]].copy() for number in chosen}
        return [rows[number] for number in range(len(places))]

    def _group(self, number: int, width: int) -> np.ndarray:
        """The first features of a row group's records; columns beyond them are not read."""
        width, pools = min(width, self.width), pools_of(self.pool)
        file, group = self._groups[number]
        starts = [0, *self.facts.widths]
        levels = [level for level, start in zip(self.facts.levels, starts, strict=False) if start < width]
        names = [[column_name(level, pool, pools) for level in levels] for pool in pools]
        read = file.read_row_group(group, columns=[name for each in names for name in each])
        blocks = [
            np.concatenate([_numbers(read, name) for name in each], axis=1)[:, :width] for each in names
        ]
        return np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]

    def _shut(self) -> None:
        for file in self._files:
            file.close()


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists as `(rows, features)`."""
    return table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
