"""Tables of sequences: comma- or tab-separated text and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from rd_torch.letters import MISSING, require_letters
from rd_torch.reading.fasta import COMMENTS, MARKS, MISSING_IN_FILES, Naming
from rd_torch.reading.text import as_latin_1
from rd_torch.sequences import Entry

DELIMITERS: Final = ("\t", ",", ";")

SEQUENCE_NAMES: Final = frozenset(
    ("sequence", "seq", "sequences", "protein_sequence", "proteinsequence", "aa_sequence", "aa_seq", "aaseq",
     "amino_acid_sequence", "aminoacidsequence", "primary_sequence", "full_sequence", "fasta")
)  # fmt: skip
IDENTIFIER_NAMES: Final = frozenset(
    ("identifier", "id", "ids", "name", "entry", "accession", "protein_id", "proteinid", "protein",
     "protein_name", "uniprot", "uniprot_id", "uniprotid", "uniprot_accession", "uniprotkb", "seq_id",
     "seqid", "sequence_id", "header")
)  # fmt: skip
"""How columns are called in the files of databases and other programs, in lower case with `_` for blanks."""

_NOTHING: Final = MISSING_IN_FILES | {"", "N/A", "n/a", "<NA>", "#N/A", "-"}

ROWS_GUESSED_FROM: Final = 20
"""Rows that are looked at to tell which column has the sequences."""


class Columns(NamedTuple):
    """Which columns are read.

    Attributes:
        sequence: the one with the sequences.
        identifier: the one with the names; None where rows are numbered.
        said: what was guessed, in a sentence; nothing where all was told.
    """

    sequence: str
    identifier: str | None
    said: str = ""


def delimiter_of(beginning: str) -> str | None:
    """What parts the columns of a text that begins so; None where its first line has none."""
    lines = (line.strip("\ufeff\r\n") for line in beginning.splitlines())
    first = next((line for line in lines if line.strip() and not line.startswith(COMMENTS)), "")
    found = [each for each in DELIMITERS if each in first]
    if found:
        return found[0]
    return "," if _called(first.strip('" ')) in SEQUENCE_NAMES else None


def read_text_table(
    handle: IO[str], source: str, delimiter: str, wanted: Sequence[str | None], name: Naming | None
) -> Iterator[Entry | Columns]:
    """First the columns that are read, then the records of a table, each with its line.

    Args:
        handle: the text, line breaks as they are.
        source: what it is called.
        delimiter: what parts its columns.
        wanted: the columns of sequences and identifiers; None for one that is guessed.
        name: makes identifiers of what stands in their column; None takes them as they are.

    Raises:
        ValueError: for a table without a header row, or columns that cannot be told.
    """
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    rows = ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
    try:
        tops = (row for _, row in rows if not row[0].strip(MARKS).startswith(COMMENTS))
        header = [cell.strip(MARKS) for cell in next(tops, [])]
        head = list(islice(rows, ROWS_GUESSED_FROM))
        samples = [[row[place] for _, row in head if place < len(row)] for place in range(len(header))]
        columns = choose(dict(zip(header, samples, strict=True)), header, source, wanted)
        yield columns
        places = [header.index(each) if each is not None else None for each in columns[:2]]
        for count, (line, row) in enumerate(chain(head, rows), start=1):
            if len(row) == len(header):
                identifier, sequence = (str(count) if place is None else row[place] for place in places[::-1])
                yield entry(identifier, sequence, source, line, name)
            else:
                fault = f"expected {len(header):,} columns, as in the header row, got {len(row):,}"
                yield Entry(f"line {line}", "", source, line, fault)
    except csv.Error as error:
        raise ValueError(
            f"expected a table, got one that does not read in line {reader.line_num:,} of {source}: {error}"
        ) from error


def read_parquet(
    body: Path | IO[bytes], source: str, wanted: Sequence[str | None], name: Naming | None
) -> Iterator[Entry | Columns]:
    """The same of a Parquet file, whose rows are counted from 1; one that is packed is held in memory.

    Raises:
        ValueError: for columns that cannot be told.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq  # load only for such a file

    try:
        table = pq.ParquetFile(body if isinstance(body, Path) else pa.BufferReader(body.read()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected a Parquet file, got one that is broken: {source}: {error}") from error
    texts = [field.name for field in table.schema_arrow if _is_text(field.type)]
    first = next(table.iter_batches(ROWS_GUESSED_FROM, columns=texts), None)
    samples = {
        each: [] if first is None else [_text(cell) for cell in first[each].to_pylist()] for each in texts
    }
    columns = choose(samples, table.schema_arrow.names, source, wanted)
    yield columns
    number = 0
    for batch in table.iter_batches(columns=[each for each in columns[:2] if each is not None]):
        sequences = batch[columns.sequence].to_pylist()
        identifiers = sequences if columns.identifier is None else batch[columns.identifier].to_pylist()
        for identifier, sequence in zip(identifiers, sequences, strict=True):
            number += 1
            named = str(number) if columns.identifier is None else _text(identifier)
            yield entry(named, _text(sequence), source, number, name)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(values) or pa.types.is_large_string(values))


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)


def entry(identifier: str, sequence: str, source: str, number: int, name: Naming | None) -> Entry:
    """The record of a row, checked for an identifier and a sequence.

    Args:
        identifier: what stands in its column.
        sequence: likewise.
        source: what the table is called.
        number: the line or row.
        name: makes an identifier of what stands there; None takes it as it is.
    """
    identifier, fault = as_latin_1(identifier.strip(MARKS)), ""
    if identifier in _NOTHING or identifier in MISSING:
        identifier, fault = f"line {number}", "expected an identifier, got none"
    elif name is not None:
        try:
            identifier = name(identifier)
        except ValueError as error:
            fault = str(error)
    if sequence.strip(MARKS) in _NOTHING:
        fault = fault or "expected a sequence, got none"
    return Entry(identifier, "" if fault else sequence, source, number, fault)


def choose(
    samples: dict[str, list[str]], header: Sequence[str], source: str, wanted: Sequence[str | None]
) -> Columns:
    """The columns that are read: those that were named, or else the only ones that can be meant.

    Args:
        samples: the first cells of each column of text, by its name.
        header: the names of all columns.
        source: what the table is called.
        wanted: the columns of sequences and identifiers; None for one that is guessed.

    Raises:
        ValueError: for a column that is not there, or where more than one or none can be meant.
    """
    listed = ", ".join(map(repr, header))
    if len(set(header)) < len(header):
        raise ValueError(f"expected a table whose columns have different names, got {listed} in {source}")
    for each in wanted:
        if each is not None and each not in header:
            raise ValueError(f"expected a column {each!r}, got {listed} in {source}")
    sequence, identifier = wanted
    if sequence is None:
        sequence = _only(_of_sequences(samples), "--sequence-column", "sequences", listed, source)
        if sequence.isupper() and _are_sequences([sequence]):
            raise ValueError(f"expected a header row with the names of columns, got {listed} in {source}")
    if identifier is None:
        others = {each: cells for each, cells in samples.items() if each != sequence}
        named = [each for each in header if each != sequence and _called(each) in IDENTIFIER_NAMES]
        meant = [each for each in named if not _are_sequences(samples.get(each, []))]
        meant = meant or [each for each, cells in others.items() if _are_names(cells)]
        if meant:
            identifier = _only(meant, "--identifier-column", "identifiers", listed, source)
    guessed = [
        f"{what} from column {column!r}" if column is not None else "rows numbered, for want of identifiers"
        for what, column, told in zip(
            ("sequences", "identifiers"), (sequence, identifier), wanted, strict=True
        )
        if told is None
    ]
    return Columns(sequence, identifier, f"{', '.join(guessed)}, as guessed of {source}" if guessed else "")


def _of_sequences(samples: dict[str, list[str]]) -> list[str]:
    """The columns that may have the sequences: by name, or else by what is in them."""
    return [each for each in samples if _called(each) in SEQUENCE_NAMES] or [
        each for each, cells in samples.items() if _are_sequences(cells)
    ]


def _are_sequences(cells: Iterable[str]) -> bool:
    """Whether all cells that are not empty are long enough and spelled like sequences."""
    found = [cell for cell in cells if cell.strip(MARKS) not in _NOTHING]
    try:
        for cell in found:
            require_letters(cell)
    except ValueError:
        return False
    return bool(found) and min(map(len, found)) >= 10


def _are_names(cells: Sequence[str]) -> bool:
    """Whether cells can name records: all there and different, each with a letter in it."""
    return (
        len(set(cells)) == len(cells) > 0
        and not _NOTHING.intersection(cells)
        and all(any(map(str.isalpha, cell)) for cell in cells)
        and not _are_sequences(cells)
    )


def _only(chosen: Sequence[str], flag: str, what: str, listed: str, source: str) -> str:
    """The one column that can be meant."""
    if len(chosen) == 1:
        return chosen[0]
    can = "none can be told" if not chosen else f"{' and '.join(map(repr, chosen))} can be meant"
    raise ValueError(
        f"expected one column of {what}, got {listed} in {source}, of which {can}: name it with {flag}"
    )


def _called(name: str) -> str:
    """A column's name as the lists above spell it."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")
