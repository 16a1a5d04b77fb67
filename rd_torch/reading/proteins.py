"""`Proteins`: the records of files, folders and pipes; `Fasta`: of one FASTA file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rd_torch.reading.fasta import COMMENTS, MARKS, naming, read_fasta
from rd_torch.reading.tables import Columns, delimiter_of, read_parquet, read_text_table
from rd_torch.reading.text import STANDARD_INPUT, Opened, is_read_once, opened
from rd_torch.sequences import Entry, Protein, sound_proteins

SUFFIXES: Final = frozenset(
    (".fasta", ".fa", ".faa", ".fas", ".fsa", ".fst", ".pep", ".aa", ".seq", ".csv", ".tsv", ".tab",
     ".parquet")
)  # fmt: skip
"""Files that are taken from a folder, packed or not."""

PACKED_SUFFIXES: Final = frozenset((".gz", ".bgz", ".xz", ".bz2", ".zst"))


class Proteins:
    """The proteins of FASTA files and tables, read as they are needed, one file after the other.

    What a file is, and how it is packed (gzip, xz, bzip2, zstd), is told by its content, not by its name.
    Sequences come as they are written.

    Args:
        sources: files, pipes, `-` for standard input, and folders, of which the files with the usual suffixes
            are taken in the order of their names.
        identifier: what is taken of a header as the identifier: `"word"`, the first word; `"header"`, the
            whole line; `"uniprot"`, the accession of `sp|ACCESSION|NAME`; or a regular expression, of which
            the first group is taken, or all of it. By default the first word, and the whole header where a
            store of fair-esm's `.pt` files is written. In tables it acts on the column of identifiers, if it
            is given.
        sequence_column: the column of a table that has the sequences; by default the only one that can be
            meant.
        identifier_column: the one that has the identifiers; likewise.

    Raises:
        FileNotFoundError: where a source is not there.
        ValueError: for no sources, a folder without such files, or a rule that is no regular expression;
            while iterating, for a file that is neither FASTA nor a table, is broken, or has no record; and
            for the first record that cannot be read, with its file and line.
    """

    def __init__(
        self,
        *sources: str | Path,
        identifier: str | None = None,
        sequence_column: str | None = None,
        identifier_column: str | None = None,
    ) -> None:
        if not sources:
            raise ValueError("expected at least one file of sequences, got none")
        self.sources = [each for source in sources for each in _files_of(source)]
        self.identifier = identifier
        self.table_columns = (sequence_column, identifier_column)
        naming(identifier or "word")
        self._sizes = [0 if is_read_once(each) else Path(each).stat().st_size for each in self.sources]
        self._file: Opened | None = None
        self._behind = 0
        self._used = self._ended = False

    @property
    def is_read_once(self) -> bool:
        """Whether one of the sources can be read a single time, as standard input can."""
        return any(map(is_read_once, self.sources))

    def require_files(self) -> None:
        """Raises a ValueError for standard input and pipes, which no other process can read."""
        if self.is_read_once:
            raise ValueError(
                "expected files that every process can read, got standard input or a pipe: write it to a "
                "file first"
            )

    @property
    def fraction(self) -> float | None:
        """Share of the bytes that the latest iteration has read; None of pipes, which say no size."""
        if self._ended:
            return 1.0
        if self.is_read_once:
            return None
        here = self._file.position if self._file else 0
        return min(1.0, (self._behind + here) / (sum(self._sizes) or 1))

    def __iter__(self) -> Iterator[Protein]:
        return sound_proteins(self.entries())

    def entries(self, identifier: str = "word") -> Iterator[Entry]:
        """All records with their places, those that cannot be read with their faults.

        Args:
            identifier: the rule where none was chosen.
        """
        if self._used and self.is_read_once:
            raise ValueError("expected to read standard input or a pipe once, got a second time")
        self._used, self._ended, self._behind = True, False, 0
        identifier = self.identifier or identifier
        if len(self.sources) > 1:
            self._require_readable(identifier)
        for source, size in zip(self.sources, self._sizes, strict=True):
            yield from self._of(source, identifier)
            self._behind += size
        self._ended = True

    def _require_readable(self, identifier: str) -> None:
        """Raises now for a file that cannot be read, not when those before it have been worked through."""
        for source in self.sources:
            if not is_read_once(source):
                next(self._of(source, identifier, quietly=True))

    def _of(self, source: str, identifier: str, *, quietly: bool = False) -> Iterator[Entry]:
        """The records of one source; says which columns of a table are guessed, unless it is only tried."""
        with opened(source) as file:
            self._file = file
            for each in self._parsed(file, source, identifier):
                if isinstance(each, Entry):
                    file.records += 1
                    yield each
                elif each.said and not quietly:
                    warnings.warn(each.said, stacklevel=2)
            if not file.records:
                raise ValueError(f"expected at least one record, got none in {file.name}")
        self._file = None

    def _parsed(self, file: Opened, source: str, identifier: str) -> Iterator[Entry | Columns]:
        """The records of one file, whatever it is; of a table first which columns are read."""
        name = naming(identifier) if self.identifier else None
        if file.is_parquet:
            body = file.body if file.is_packed or is_read_once(source) else Path(source)
            yield from read_parquet(body, file.name, self.table_columns, name)
            return
        beginning = file.beginning()
        delimiter = None if _begins_a_record(beginning) else delimiter_of(beginning)
        if delimiter is None:
            yield from read_fasta(file.text(), file.name, naming(identifier))
        else:
            text = file.text(newline="")
            yield from read_text_table(text, file.name, delimiter, self.table_columns, name)


class Fasta(Proteins):
    """The records of a FASTA file, read as they are needed.

    Gzipped, xz-, bzip2- or zstd-compressed or plain is told by its first bytes. Sequences come as they are
    written. Lines that begin with `;`, `#` or `!` are comments.

    Args:
        path: the file, or a pipe; every iteration reads it from its start.
        identifier: as for `Proteins`.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: while iterating, for a file that is not FASTA, has no record, or a record without
            identifier or sequence, or with a line that is no sequence, with the line and the character.
    """

    def __init__(self, path: str | Path, *, identifier: str | None = None) -> None:
        if str(path) != STANDARD_INPUT and (not Path(path).exists() or Path(path).is_dir()):
            raise FileNotFoundError(f"expected a FASTA file at {path}, got nothing there")
        super().__init__(path, identifier=identifier)

    def _parsed(self, file: Opened, source: str, identifier: str) -> Iterator[Entry | Columns]:
        """The records of the file."""
        yield from read_fasta(file.text(), file.name, naming(identifier))


def _files_of(source: str | Path) -> list[str]:
    """A source as it is, or the files in a folder.

    Raises:
        FileNotFoundError: where nothing is.
        ValueError: for a folder without files of sequences.
    """
    if str(source) == STANDARD_INPUT:
        return [STANDARD_INPUT]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"expected a file of sequences at {path}, got nothing there")
    if not path.is_dir():
        return [str(path)]
    found = [str(each) for each in sorted(path.iterdir()) if each.is_file() and _is_of_sequences(each)]
    if not found:
        raise ValueError(
            f"expected a folder with files that end in {', '.join(sorted(SUFFIXES))}, packed or not, got "
            f"none in {path}"
        )
    return found


def _is_of_sequences(path: Path) -> bool:
    """Whether a file's name has one of the usual suffixes."""
    suffixes = [each.lower() for each in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    hidden = path.name.startswith(".") or path.name.endswith(".failed.tsv")  # which is our own list
    return bool(suffixes) and suffixes[-1] in SUFFIXES and not hidden


def _begins_a_record(beginning: str) -> bool:
    """Whether the first line that is neither blank nor a comment starts a FASTA record."""
    lines = (line.strip(MARKS) for line in beginning.splitlines())
    first = next((line for line in lines if line and not line.startswith(COMMENTS)), "")
    return first.startswith(">")
