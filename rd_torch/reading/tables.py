"""Read tables of sequences, as text with commas, tabs or semicolons between columns, or as Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from rd_torch.letters import MISSING, require_letters
from rd_torch.reading.fasta import COMMENTS, MARKS, MISSING_IN_FILES, IdentifierRule
from rd_torch.reading.text import as_latin_1
from rd_torch.sequences import Entry

DELIMITERS: Final = ("\t", ",", ";")
"""Characters between columns, looked for in this order: names between tabs may have commas in them."""

SEQUENCE_NAMES: Final = frozenset(
    ("sequence", "seq", "sequences", "protein_sequence", "proteinsequence", "aa_sequence", "aa_seq", "aaseq",
     "amino_acid_sequence", "aminoacidsequence", "primary_sequence", "full_sequence", "fasta")
)  # fmt: skip
IDENTIFIER_NAMES: Final = frozenset(
    ("identifier", "id", "ids", "name", "entry", "accession", "protein_id", "proteinid", "protein",
     "protein_name", "uniprot", "uniprot_id", "uniprotid", "uniprot_accession", "uniprotkb", "seq_id",
     "seqid", "sequence_id", "header")
)  # fmt: skip
"""Names of columns in the files of databases and other programs, in lower case with `_` for blanks."""

_NOTHING: Final = MISSING_IN_FILES | {"", "N/A", "n/a", "<NA>", "#N/A", "-"}
"""Contents of cells that have no value."""

ROWS_GUESSED_FROM: Final = 20
"""Number of first rows by which it is guessed which column has the sequences."""

LEAST_RESIDUES_GUESSED_FROM: Final = 10
"""Residues in each cell of a column that is guessed to hold sequences: what is shorter may be a name."""


class Columns(NamedTuple):
    """Names of the columns that are read.

    Attributes:
        sequence: column with the sequences.
        identifier: column with the identifiers; None where rows are numbered.
        notice: a sentence that says what was guessed; empty where both columns were named.
    """

    sequence: str
    identifier: str | None
    notice: str = ""


def delimiter_of(beginning: str) -> str | None:
    """Find the character between the columns of a text that begins so; None for a text without columns."""
    lines = (line.strip("\ufeff\r\n") for line in beginning.splitlines())
    first = next((line for line in lines if line.strip() and not line.startswith(COMMENTS)), "")
    found = [each for each in DELIMITERS if each in first]
    if found:
        return found[0]
    return "," if _spelled(first.strip('" ')) in SEQUENCE_NAMES else None


def read_text_table(
    handle: IO[str],
    source: str,
    delimiter: str,
    wanted: Sequence[str | None],
    identify: IdentifierRule | None,
) -> Iterator[Entry | Columns]:
    """Read a table that is text.

    Args:
        handle: the text, with line breaks as they are in the file.
        source: name of the table in messages.
        delimiter: character between its columns.
        wanted: names of the columns of sequences and identifiers; None for one that is to be guessed.
        identify: finds the identifier in a cell of its column; None takes the cell as it is.

    Yields:
        First the columns that are read, then the records, each with its line.

    Raises:
        ValueError: for a table without a header row, or where a column cannot be guessed.
    """
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    rows = ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
    try:
        tops = (row for _, row in rows if not row[0].strip(MARKS).startswith(COMMENTS))
        header = [cell.strip(MARKS) for cell in next(tops, [])]
        head = list(islice(rows, ROWS_GUESSED_FROM))
        samples = [[row[place] for _, row in head if place < len(row)] for place in range(len(header))]
        columns = choose_columns(dict(zip(header, samples, strict=True)), header, source, wanted)
        yield columns
        places = [header.index(each) if each is not None else None for each in columns[:2]]
        for count, (line, row) in enumerate(chain(head, rows), start=1):
            if len(row) == len(header):
                identifier, sequence = (str(count) if place is None else row[place] for place in places[::-1])
                yield entry_of_row(identifier, sequence, source, line, identify)
            else:
                fault = f"expected {len(header):,} columns, as in the header row, got {len(row):,}"
                yield Entry(f"line {line}", "", source, line, fault)
    except csv.Error as error:
        raise ValueError(
            f"expected a table, got one that does not read in line {reader.line_num:,} of {source}: {error}"
        ) from error


def read_parquet(
    body: Path | IO[bytes], source: str, wanted: Sequence[str | None], identify: IdentifierRule | None
) -> Iterator[Entry | Columns]:
    """Read a table that is a Parquet file.

    Args:
        body: the file, or its unpacked bytes, which are then held in memory.
        source: name of the table in messages.
        wanted: names of the columns of sequences and identifiers; None for one that is to be guessed.
        identify: finds the identifier in a cell of its column; None takes the cell as it is.

    Yields:
        First the columns that are read, then the records, each with the number of its row, from 1.

    Raises:
        ValueError: for a file that is broken, or where a column cannot be guessed.
    """
    import pyarrow as pa  # here, because it takes long to load and few files need it
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(body if isinstance(body, Path) else pa.BufferReader(body.read()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected a Parquet file, got one that is broken: {source}: {error}") from error
    texts = [field.name for field in table.schema_arrow if _is_text(field.type)]
    first = next(table.iter_batches(ROWS_GUESSED_FROM, columns=texts), None)
    samples = {
        each: [] if first is None else [_text_of(cell) for cell in first[each].to_pylist()] for each in texts
    }
    columns = choose_columns(samples, table.schema_arrow.names, source, wanted)
    yield columns
    number = 0
    for batch in table.iter_batches(columns=[each for each in columns[:2] if each is not None]):
        sequences = batch[columns.sequence].to_pylist()
        identifiers = sequences if columns.identifier is None else batch[columns.identifier].to_pylist()
        for identifier, sequence in zip(identifiers, sequences, strict=True):
            number += 1
            named = str(number) if columns.identifier is None else _text_of(identifier)
            yield entry_of_row(named, _text_of(sequence), source, number, identify)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(values) or pa.types.is_large_string(values))


def _text_of(cell: object) -> str:
    return "" if cell is None else str(cell)


def entry_of_row(
    identifier: str, sequence: str, source: str, number: int, identify: IdentifierRule | None
) -> Entry:
    """Make the record of a row, and check that it has an identifier and a sequence.

    Args:
        identifier: cell of the identifier.
        sequence: cell of the sequence.
        source: name of the table in messages.
        number: number of the line or row.
        identify: finds the identifier in its cell; None takes the cell as it is.

    Returns:
        The record.
    """
    identifier, fault = as_latin_1(identifier.strip(MARKS)), ""
    if identifier in _NOTHING or identifier in MISSING:
        identifier, fault = f"line {number}", "expected an identifier, got none"
    elif identify is not None:
        try:
            identifier = identify(identifier)
        except ValueError as error:
            fault = str(error)
    if sequence.strip(MARKS) in _NOTHING:
        fault = fault or "expected a sequence, got none"
    return Entry(identifier, "" if fault else sequence, source, number, fault)


def choose_columns(
    samples: dict[str, list[str]], header: Sequence[str], source: str, wanted: Sequence[str | None]
) -> Columns:
    """Choose the columns that are read: those that were named, or else the only ones that can be meant.

    Args:
        samples: the first cells of each column of text, by the column's name.
        header: names of all columns.
        source: name of the table in messages.
        wanted: names of the columns of sequences and identifiers; None for one that is to be guessed.

    Returns:
        The columns, and what was guessed.

    Raises:
        ValueError: for a column that is not there, or where several columns, or none, can be meant.
    """
    listed = ", ".join(map(repr, header))
    if len(set(header)) < len(header):
        raise ValueError(f"expected a table whose columns have different names, got {listed} in {source}")
    for each in wanted:
        if each is not None and each not in header:
            raise ValueError(f"expected a column {each!r}, got {listed} in {source}")
    sequence, identifier = wanted
    if sequence is None:
        sequence = _require_one(_sequence_columns(samples), "--sequence-column", "sequences", listed, source)
        if sequence.isupper() and _are_sequences([sequence]):
            raise ValueError(f"expected a header row with the names of columns, got {listed} in {source}")
    if identifier is None:
        others = {each: cells for each, cells in samples.items() if each != sequence}
        named = [each for each in header if each != sequence and _spelled(each) in IDENTIFIER_NAMES]
        meant = [each for each in named if not _are_sequences(samples.get(each, []))]
        meant = meant or [each for each, cells in others.items() if _are_names(cells)]
        if meant:
            identifier = _require_one(meant, "--identifier-column", "identifiers", listed, source)
    guessed = [
        f"{what} from column {column!r}" if column is not None else "row numbers for identifiers"
        for what, column, told in zip(
            ("sequences", "identifiers"), (sequence, identifier), wanted, strict=True
        )
        if told is None
    ]
    return Columns(sequence, identifier, f"guessed for {source}: {', '.join(guessed)}" if guessed else "")


def find_sequence_column(samples: dict[str, list[str]], source: str) -> str:
    """Find the only column of a table that can have the sequences.

    Args:
        samples: the first cells of each column, by the column's name.
        source: name of the table in messages.

    Returns:
        The name of the column.

    Raises:
        ValueError: where several columns, or none, can be meant.
    """
    listed = ", ".join(map(repr, samples))
    return _require_one(_sequence_columns(samples), "--sequence-column", "sequences", listed, source)


def _sequence_columns(samples: dict[str, list[str]]) -> list[str]:
    """Return the columns that may have the sequences, by their names, or else by their cells."""
    return [each for each in samples if _spelled(each) in SEQUENCE_NAMES] or [
        each for each, cells in samples.items() if _are_sequences(cells)
    ]


def _are_sequences(cells: Iterable[str]) -> bool:
    """Tell whether all cells that are not empty are long enough and spelled like sequences."""
    found = [cell for cell in cells if cell.strip(MARKS) not in _NOTHING]
    try:
        for cell in found:
            require_letters(cell)
    except ValueError:
        return False
    return bool(found) and min(map(len, found)) >= LEAST_RESIDUES_GUESSED_FROM


def _are_names(cells: Sequence[str]) -> bool:
    """Tell whether cells can be identifiers: all there and different, each with a letter in it."""
    return (
        len(set(cells)) == len(cells) > 0
        and not _NOTHING.intersection(cells)
        and all(any(map(str.isalpha, cell)) for cell in cells)
        and not _are_sequences(cells)
    )


def _require_one(chosen: Sequence[str], flag: str, what: str, listed: str, source: str) -> str:
    """Return the one column that can be meant; raise a ValueError for none or several."""
    if len(chosen) == 1:
        return chosen[0]
    can = f"{' and '.join(map(repr, chosen))} can be meant" if chosen else "none is known to have them"
    raise ValueError(
        f"expected one column of {what}, got {listed} in {source}, of which {can}: name it with {flag}"
    )


def _spelled(name: str) -> str:
    """Return a column's name as the lists above spell it."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")
