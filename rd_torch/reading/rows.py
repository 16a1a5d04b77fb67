"""All cells of a table, for those who read more of it than sequences and identifiers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from rd_torch.reading.tables import delimiter_of
from rd_torch.reading.text import OpenFile, open_source

_COMMENT: Final = "#"


class Cells(NamedTuple):
    """A table, cell by cell, as text.

    Attributes:
        header: names of the columns.
        lines: for each row its line, or its number in a Parquet file, from 1.
        rows: the cells of each row.
    """

    header: list[str]
    lines: list[int]
    rows: list[list[str]]


def read_cells(path: str | Path) -> Cells:
    """Read a whole table into memory: text with commas, tabs or semicolons, packed or not, or Parquet.

    Args:
        path: the table.

    Returns:
        Its cells, without blanks around them. A cell without a value is empty.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is no table, is broken or has no header row, for columns that share a
            name, and for a row that has another number of cells than the header.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"expected a table at {path}, got nothing there")
    (_, header), *numbered = read_rows(path)
    cells = Cells(header, [line for line, _ in numbered], [[*map(str.strip, row)] for _, row in numbered])
    if len(cells.header) < 2:
        raise ValueError(
            f"expected a table with commas, tabs or semicolons between columns, got one column in {path}"
        )
    if len(set(cells.header)) < len(cells.header):
        listed = ", ".join(map(repr, cells.header))
        raise ValueError(f"expected a table whose columns have different names, got {listed} in {path}")
    for line, row in zip(cells.lines, cells.rows, strict=True):
        if len(row) != len(cells.header):
            raise ValueError(
                f"expected {len(cells.header):,} columns, as in the header row, got {len(row):,} "
                f"(line {line:,} of {path})"
            )
    return cells


def read_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a table as they come; what kind of file it is, its content tells.

    Args:
        path: the table, as for `read_cells`.

    Yields:
        The line of each row, or its number in a Parquet file, and its cells. The header row comes first.

    Raises:
        ValueError: for a file that is no table or broken, or that has no header row.
    """
    with open_source(path) as file:
        yield from _parquet_rows(file, Path(path)) if file.is_parquet else _text_rows(file)


def _text_rows(file: OpenFile) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are neither blank nor, before the header, comments."""
    delimiter = delimiter_of(file.beginning()) or "\t"
    reader, begun = csv.reader(file.text(newline=""), delimiter=delimiter, strict=True), False
    try:
        for row in reader:
            cells = row if begun else [cell.strip("\ufeff \t") for cell in row]
            if not any(map(str.strip, cells)) or (not begun and cells[0].startswith(_COMMENT)):
                continue
            begun = True
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"expected a table, got one that does not read in line {reader.line_num:,} of {file.name}: "
            f"{error}"
        ) from error
    if not begun:
        raise ValueError(f"expected a table with a header row, got no row in {file.name}")


def _parquet_rows(file: OpenFile, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the names of the columns, and then the rows; only a packed file is held in memory."""
    import pyarrow as pa  # here, because it takes long to load and few files need it
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(file.body.read()) if file.is_packed else path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected a Parquet file, got one that is broken: {file.name}: {error}") from error
    yield 0, list(table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches():
        for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            number += 1
            yield number, ["" if cell is None else str(cell) for cell in cells]
