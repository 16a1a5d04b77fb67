"""All cells of a table, for those who read more of it than sequences and identifiers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import IO, Final, NamedTuple

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
        Its cells. A cell without a value is empty.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is no table, is broken or has no header row, for columns that share a
            name, and for a row that has another number of cells than the header.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"expected a table at {path}, got nothing there")
    with open_source(path) as file:
        cells = _read_parquet(file) if file.is_parquet else _read_text(file)
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


def _read_text(file: OpenFile) -> Cells:
    """Read a table that is text; blank lines and comments before the header are skipped."""
    delimiter = delimiter_of(file.beginning())
    if delimiter is None:
        raise ValueError(
            f"expected a table with commas, tabs or semicolons between columns, got none in {file.name}"
        )
    handle: IO[str] = file.text(newline="")
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    header: list[str] = []
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        for row in reader:
            if not any(map(str.strip, row)) or (not header and row[0].strip("\ufeff ").startswith(_COMMENT)):
                continue
            if header:
                lines.append(reader.line_num)
                rows.append([cell.strip() for cell in row])
            else:
                header = [cell.strip("\ufeff \t") for cell in row]
    except csv.Error as error:
        raise ValueError(
            f"expected a table, got one that does not read in line {reader.line_num:,} of {file.name}: "
            f"{error}"
        ) from error
    return Cells(header, lines, rows)


def _read_parquet(file: OpenFile) -> Cells:
    """Read a table that is a Parquet file."""
    import pyarrow as pa  # here, because it takes long to load and few files need it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(file.body.read()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected a Parquet file, got one that is broken: {file.name}: {error}") from error
    columns = [column.to_pylist() for column in table.columns]
    rows = [["" if cell is None else str(cell) for cell in row] for row in zip(*columns, strict=True)]
    return Cells(list(table.column_names), list(range(1, len(rows) + 1)), rows)
