"""`Proteins`, the records of files, folders and pipes, and `Fasta`, the records of one FASTA file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rd_torch.reading.fasta import COMMENTS, MARKS, compile_rule, read_fasta
from rd_torch.reading.tables import Columns, delimiter_of, read_parquet, read_text_table
from rd_torch.reading.text import STANDARD_INPUT, OpenFile, is_read_once, open_source
from rd_torch.sequences import Entry, Protein, require_sound

SUFFIXES: Final = frozenset(
    (".fasta", ".fa", ".faa", ".fas", ".fsa", ".fst", ".pep", ".aa", ".seq", ".csv", ".tsv", ".tab",
     ".parquet")
)  # fmt: skip
"""Suffixes of the files that are taken from a folder, packed or not."""

PACKED_SUFFIXES: Final = frozenset((".gz", ".bgz", ".xz", ".bz2", ".zst"))


class Proteins:
    """The proteins in FASTA files and tables, which are read as they are needed, one file after the other.

    What a file is, and how it is packed (gzip, xz, bzip2, zstd), is told by its content, not by its name.
    Iterating gives `Protein`s with their sequences as they are written.

    Args:
        *sources: files, pipes, `-` for standard input, and folders. Of a folder the files with the usual
            suffixes are read, in the order of their names.
        identifier: which part of a header is the identifier: `"word"` for the first word; `"header"` for the
            whole line; `"uniprot"` for the accession in `sp|ACCESSION|NAME`; or a regular expression, for
            what its first group matches, or all of it where it has no group. By default the first word, but
            the whole line where a store of fair-esm's `.pt` files is written. In a table the rule, if one is
            given, is applied to the column of identifiers.
        sequence_column: name of the column of a table that has the sequences; by default the only column that
            can be meant.
        identifier_column: name of the column of a table that has the identifiers; by default the only column
            that can be meant, or else rows are numbered.

    Raises:
        FileNotFoundError: where a source is not there.
        ValueError: for no sources, a folder without such files, or a rule that is no regular expression;
            while iterating, for a file that is neither FASTA nor a table, is broken, or has no record, and
            for the first record that cannot be read, with its file and line.

    Examples:
        >>> with open("table.csv", "w") as file:
        ...     print("clone,heavy,light", "c1,MKTAYI,GSHMLE", sep=chr(10), file=file)
        >>> columns = {"sequence_column": "heavy", "identifier_column": "clone"}
        >>> [(each.identifier, each.sequence) for each in rd_torch.Proteins("table.csv", **columns)]
        [('c1', 'MKTAYI')]
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
        compile_rule(identifier or "word")  # refuses a wrong rule now, not when the first record is read
        self._sizes = [0 if is_read_once(each) else Path(each).stat().st_size for each in self.sources]
        self._file: OpenFile | None = None
        self._bytes_before = 0
        self._used = self._ended = False

    @property
    def is_read_once(self) -> bool:
        """Whether a source, such as standard input, can be read only once."""
        return any(map(is_read_once, self.sources))

    def require_files(self) -> None:
        """Require that other processes can read all sources.

        Raises:
            ValueError: for standard input and pipes.
        """
        if self.is_read_once:
            raise ValueError(
                "expected files that every process can read, got standard input or a pipe: write it to a "
                "file first"
            )

    @property
    def fraction(self) -> float | None:
        """Share of the bytes that the latest iteration has read; None where a pipe does not tell its size."""
        if self._ended:
            return 1.0
        if self.is_read_once:
            return None
        here = self._file.position if self._file else 0
        return min(1.0, (self._bytes_before + here) / (sum(self._sizes) or 1))

    def __iter__(self) -> Iterator[Protein]:
        return require_sound(self.entries())

    def entries(self, identifier: str = "word") -> Iterator[Entry]:
        """Read all records, those with a fault included.

        Args:
            identifier: the rule for headers where `Proteins` was given none.

        Yields:
            Each record with its file and line; one that cannot be read has a fault and no sequence.

        Raises:
            ValueError: for a file that cannot be read, and for a pipe that is read a second time.
        """
        if self._used and self.is_read_once:
            raise ValueError("expected to read standard input or a pipe once, got a second time")
        self._used, self._ended, self._bytes_before = True, False, 0
        identifier = self.identifier or identifier
        if len(self.sources) > 1:
            self._require_readable(identifier)
        for source, size in zip(self.sources, self._sizes, strict=True):
            yield from self._read(source, identifier)
            self._bytes_before += size
        self._ended = True

    def _require_readable(self, identifier: str) -> None:
        """Raise now for a file that cannot be read, not hours later when those before it are done."""
        for source in self.sources:
            if not is_read_once(source):
                next(self._read(source, identifier, quietly=True))

    def _read(self, source: str, identifier: str, *, quietly: bool = False) -> Iterator[Entry]:
        """Yield the records of one source; unless quietly, warn which columns of a table are guessed."""
        with open_source(source) as file:
            self._file = file
            for each in self._parse(file, source, identifier):
                if isinstance(each, Entry):
                    file.records += 1
                    yield each
                elif each.notice and not quietly:
                    warnings.warn(each.notice, stacklevel=2)
            if not file.records:
                raise ValueError(f"expected at least one record, got none in {file.name}")
        self._file = None

    def _parse(self, file: OpenFile, source: str, identifier: str) -> Iterator[Entry | Columns]:
        """Yield the records of one file, whatever it is; of a table first the columns that are read."""
        rule = compile_rule(identifier) if self.identifier else None
        if file.is_parquet:
            body = file.body if file.is_packed or is_read_once(source) else Path(source)
            yield from read_parquet(body, file.name, self.table_columns, rule)
            return
        beginning = file.beginning()
        delimiter = None if _begins_a_record(beginning) else delimiter_of(beginning)
        if delimiter is None:
            yield from read_fasta(file.text(), file.name, compile_rule(identifier))
        else:
            text = file.text(newline="")
            yield from read_text_table(text, file.name, delimiter, self.table_columns, rule)


class Fasta(Proteins):
    """The proteins in a FASTA file, which are read as they are needed.

    Whether the file is packed, by gzip, xz, bzip2 or zstd, is told by its first bytes. Iterating gives
    `Protein`s with their sequences as they are written. Lines that begin with `;`, `#` or `!` are comments.

    Args:
        path: the file, or a pipe; every iteration reads the file from its start.
        identifier: which part of a header is the identifier, as for `Proteins`.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: while iterating, for a file that is not FASTA or has no record, and for a record without
            identifier or sequence, or with a line that is no sequence, with its line and the character.

    Examples:
        >>> with open("one.fasta", "w") as file:
        ...     print(">sp|P0CG48|UBC_HUMAN ubiquitin", "MQIFVK", "TLTGK", sep=chr(10), file=file)
        >>> [(each.identifier, each.sequence) for each in rd_torch.Fasta("one.fasta", identifier="uniprot")]
        [('P0CG48', 'MQIFVKTLTGK')]
    """

    def __init__(self, path: str | Path, *, identifier: str | None = None) -> None:
        if str(path) != STANDARD_INPUT and (not Path(path).exists() or Path(path).is_dir()):
            raise FileNotFoundError(f"expected a FASTA file at {path}, got nothing there")
        super().__init__(path, identifier=identifier)

    def _parse(self, file: OpenFile, source: str, identifier: str) -> Iterator[Entry | Columns]:
        """Yield the records of the file."""
        yield from read_fasta(file.text(), file.name, compile_rule(identifier))


def _files_of(source: str | Path) -> list[str]:
    """Return a source as it is, or the files of sequences in a folder; raise where there are none."""
    if str(source) == STANDARD_INPUT:
        return [STANDARD_INPUT]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"expected a file of sequences at {path}, got nothing there")
    if not path.is_dir():
        return [str(path)]
    found = [str(each) for each in sorted(path.iterdir()) if each.is_file() and _has_known_suffix(each)]
    if not found:
        raise ValueError(
            f"expected a folder with files that end in {', '.join(sorted(SUFFIXES))}, packed or not, got "
            f"none in {path}"
        )
    return found


def _has_known_suffix(path: Path) -> bool:
    """Tell whether a file's name has one of the usual suffixes."""
    suffixes = [each.lower() for each in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    hidden = path.name.startswith(".") or path.name.endswith(".failed.tsv")  # a list that we wrote
    return bool(suffixes) and suffixes[-1] in SUFFIXES and not hidden


def _begins_a_record(beginning: str) -> bool:
    """Tell whether the first line that is neither blank nor a comment starts a FASTA record."""
    lines = (line.strip(MARKS) for line in beginning.splitlines())
    first = next((line for line in lines if line and not line.startswith(COMMENTS)), "")
    return first.startswith(">")
