"""FASTA in, residues normalised, token batches cut by a token budget."""

from __future__ import annotations

import gzip
import io
import lzma
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile, islice
from pathlib import Path
from typing import IO, Final, NamedTuple, cast

import torch
from torch import Tensor

from rd_torch.config import ALPHABET, RESIDUE_LETTERS

SPECIAL_TOKENS: Final = 2
"""`<cls>` in front of a sequence and `<eos>` behind it."""

WINDOW_BATCHES: Final = 16
"""Batches' worth of sequences that are sorted by length at a time."""

_OPENERS: Final = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\x00", lzma.open))
_RESIDUES: Final = frozenset(RESIDUE_LETTERS)


class Protein(NamedTuple):
    """A sequence and its identifier, the first word of its FASTA header."""

    identifier: str
    sequence: str


class Fasta:
    """The records of a FASTA file, read as they are needed.

    Gzipped, xz-compressed or plain is told by its first bytes. Sequences come as they are written;
    `normalize` makes residues of them.

    Args:
        path: the file; every iteration reads it from its start.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: while iterating, for a file that is not FASTA, has no record, or a record without
            identifier or sequence.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"expected a FASTA file at {path}, got nothing there")
        self._size = self.path.stat().st_size
        self._position = 0

    @property
    def fraction(self) -> float:
        """Share of the file's bytes that the latest iteration has read."""
        return min(1.0, self._position / self._size) if self._size else 1.0

    def __iter__(self) -> Iterator[Protein]:
        from Bio.SeqIO.FastaIO import SimpleFastaParser  # loads only where a file is read

        number = 0
        try:
            with self.path.open("rb") as raw, _text(raw) as handle:
                for number, record in enumerate(SimpleFastaParser(self._checked(handle)), start=1):
                    self._position = raw.tell()
                    yield _protein(number, *record)
        except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"expected a FASTA file, got one that cannot be read behind record {number:,}: "
                f"{self.path}: {error}"
            ) from error
        self._position = self._size
        if not number:
            raise ValueError(f"expected at least one FASTA record, got an empty file: {self.path}")

    def _checked(self, handle: IO[str]) -> Iterator[str]:
        """The lines, from the first that is not blank, which must start a record."""
        lines = dropwhile(lambda line: not line.strip(), handle)
        for first in islice(lines, 1):
            if not first.startswith(">"):
                raise ValueError(
                    f"expected a FASTA file, whose first line starts with '>', got {first[:40]!r} "
                    f"in {self.path}"
                )
            yield first
        yield from lines


def _text(raw: IO[bytes]) -> IO[str]:
    """The text of an open file, unpacked."""
    magic = raw.read(6)
    raw.seek(0)
    for mark, opener in _OPENERS:
        if magic.startswith(mark):
            return cast(IO[str], opener(raw, "rt", encoding="utf-8"))
    return io.TextIOWrapper(raw, encoding="utf-8")


def _protein(number: int, header: str, sequence: str) -> Protein:
    """One record, checked for an identifier and a sequence."""
    words = header.split()
    if not words:
        raise ValueError(f"expected an identifier behind '>', got none in record {number}")
    sequence = "".join(sequence.split())
    if not sequence.strip("*"):
        raise ValueError(f"expected a sequence in record {number} ({words[0]}), got none")
    return Protein(words[0], sequence)


@dataclass
class Corrections:
    """Counts of what `normalize` changed."""

    stops: int = 0
    unknown: int = 0
    truncated: int = 0

    def warn(self) -> None:
        """Issues one warning that counts every kind of change, none where nothing changed."""
        kinds = (
            (self.stops, "sequences whose '*' at the end was dropped"),
            (self.unknown, "letters that are no residue, read as X"),
            (self.truncated, "sequences cut to the maximal length"),
        )
        said = [f"{what}: {count:,}" for count, what in kinds if count]
        if said:
            warnings.warn("; ".join(said), stacklevel=3)


def normalize(
    protein: Protein, corrections: Corrections, *, strict: bool = False, max_length: int | None = None
) -> Protein:
    """A protein whose letters all are residues of the alphabet.

    Lower case is read as upper. A `*` at the end is dropped. Every other letter that is no residue
    (J, `-`, `.`, an inner `*`, ...) becomes X. The length changes in no other way unless `max_length`
    cuts it.

    Args:
        protein: the record.
        corrections: receives the counts of what was changed.
        strict: refuse letters that are no residue.
        max_length: residues to keep; by default all.

    Raises:
        ValueError: for a sequence without residues; when strict, for the first letter that is none,
            with its record and position.
    """
    sequence = protein.sequence.upper()
    if sequence.endswith("*"):
        sequence = sequence[:-1]
        corrections.stops += 1
    if not sequence:
        raise ValueError(f"expected a sequence in record {protein.identifier}, got none")
    if not _RESIDUES.issuperset(sequence):
        places = [place for place, letter in enumerate(sequence) if letter not in _RESIDUES]
        if strict:
            raise ValueError(
                f"expected residues ({''.join(sorted(_RESIDUES))}), got {sequence[places[0]]!r} at "
                f"position {places[0] + 1} of record {protein.identifier}"
            )
        corrections.unknown += len(places)
        sequence = "".join(letter if letter in _RESIDUES else "X" for letter in sequence)
    if max_length is not None and len(sequence) > max_length:
        corrections.truncated += 1
        sequence = sequence[:max_length]
    return Protein(protein.identifier, sequence)


def normalized_proteins(
    proteins: Iterable[tuple[str, str]], *, strict: bool = False, max_length: int | None = None
) -> Iterator[Protein]:
    """Identifiers and sequences with only residues in them, as they come; one warning counts the changes.

    Arguments and errors as for `normalize`.
    """
    corrections = Corrections()
    for identifier, sequence in proteins:
        protein = Protein(identifier, sequence)
        yield normalize(protein, corrections, strict=strict, max_length=max_length)
    corrections.warn()


def normalized(sequences: Iterable[str]) -> Iterator[str]:
    """The same of sequences without identifiers; errors name them by their number, from 1."""
    proteins = (Protein(f"number {number}", sequence) for number, sequence in enumerate(sequences, start=1))
    return (protein.sequence for protein in normalized_proteins(proteins))


def tokenize(sequences: Sequence[str]) -> Tensor:
    """`(batch, time)` token ids of normalised sequences, `<cls>` and `<eos>` around each, padded.

    Equal to fair-esm's batch converter on sequences of single letters.
    """
    length = max((len(sequence) for sequence in sequences), default=0) + SPECIAL_TOKENS
    tokens = torch.full((len(sequences), length), ALPHABET.padding_idx)
    for row, sequence in zip(tokens, sequences, strict=True):
        ids = [ALPHABET.cls_idx, *map(ALPHABET.tok_to_idx.__getitem__, sequence), ALPHABET.eos_idx]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def cut_batches(sequences: Iterable[str], tokens_per_batch: int) -> Iterator[list[tuple[int, str]]]:
    """Batches of `(index, sequence)`, longest first within a window, so that neighbours are alike.

    A batch holds at most `tokens_per_batch` tokens, padding counted, and at least one sequence.
    Memory holds one window of about 16 batches.

    Raises:
        ValueError: for a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"expected tokens_per_batch of at least 1, got {tokens_per_batch}")
    numbered = enumerate(sequences)
    window: list[tuple[int, str]] = []
    tokens = 0
    for item in numbered:
        window.append(item)
        tokens += len(item[1]) + SPECIAL_TOKENS
        if tokens >= WINDOW_BATCHES * tokens_per_batch:
            yield from _cut_window(window, tokens_per_batch)
            window, tokens = [], 0
    yield from _cut_window(window, tokens_per_batch)


def _cut_window(window: list[tuple[int, str]], tokens_per_batch: int) -> Iterator[list[tuple[int, str]]]:
    """Cuts one window, sorted by falling length, into batches."""
    waiting = iter(sorted(window, key=lambda item: -len(item[1])))
    for longest in waiting:
        rows = max(1, tokens_per_batch // (len(longest[1]) + SPECIAL_TOKENS))
        yield [longest, *islice(waiting, rows - 1)]
