"""Records of proteins on their way: letters made residues, token batches cut by a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from rd_torch.config import SPECIAL_TOKENS
from rd_torch.letters import Corrections, read_residues

WINDOW_BATCHES: Final = 16
"""Batches' worth of sequences that are sorted by length at a time."""


class Protein(NamedTuple):
    """A sequence and its identifier."""

    identifier: str
    sequence: str


class Entry(NamedTuple):
    """A record as it comes in.

    Attributes:
        identifier: its name, which another may have too.
        sequence: its letters; empty where there is a fault.
        source: the file it is from, if any.
        line: the line or row where it stands there, or its number among what was given; from 1.
        fault: why it cannot be embedded; empty where it can.
    """

    identifier: str
    sequence: str
    source: str = ""
    line: int = 0
    fault: str = ""


def said(entry: Entry) -> str:
    """The fault of a record in a sentence that says which one it is."""
    place = f" (line {entry.line:,} of {entry.source})" if entry.source else ""
    return f"{entry.fault}, in record {entry.identifier}{place}"


def normalize(
    protein: Protein, corrections: Corrections, *, strict: bool = False, max_length: int | None = None
) -> Protein:
    """A protein whose letters all are residues of the alphabet.

    The letters are read by `read_residues`. The length changes in no other way unless `max_length` cuts it.

    Args:
        protein: the record.
        corrections: receives the counts of what was changed.
        strict: refuse letters that are no residue.
        max_length: residues to keep; by default all.

    Raises:
        ValueError: for a sequence without residues or with signs that are no letters, with its record; when
            strict, for the first letter that is no residue, with its position.
    """
    entries = normalized_entries([Entry(*protein)], corrections, strict=strict, max_length=max_length)
    (read,) = sound_proteins(entries)
    return read


def normalized_entries(
    entries: Iterable[Entry],
    corrections: Corrections,
    *,
    strict: bool = False,
    max_length: int | None = None,
) -> Iterator[Entry]:
    """Records with only residues in them, as they come, those that cannot be read with their faults.

    Args:
        entries: the records.
        corrections: receives the counts of what was changed.
        strict: refuse letters that are no residue, and stop at the first record that cannot be read.
        max_length: residues to keep; by default all.

    Raises:
        ValueError: when strict, for the first record that cannot be read.
    """
    for entry in entries:
        read = entry if entry.fault else _read(entry, corrections, strict=strict, max_length=max_length)
        if read.fault and strict:
            raise ValueError(said(read))
        yield read


def _read(entry: Entry, corrections: Corrections, *, strict: bool, max_length: int | None) -> Entry:
    """The record with its residues, or its fault."""
    try:
        letters = read_residues(entry.sequence, corrections, strict=strict)
    except ValueError as error:
        return entry._replace(sequence="", fault=str(error))
    if max_length is not None and len(letters) > max_length:
        corrections.truncated += 1
        letters = letters[:max_length]
    return entry if letters is entry.sequence else entry._replace(sequence=letters)


def sound(entries: Iterable[Entry], left_out: list[Entry]) -> Iterator[Entry]:
    """The records that can be embedded; the others are appended to the list."""
    for entry in entries:
        if entry.fault:
            left_out.append(entry)
        else:
            yield entry


def sound_proteins(entries: Iterable[Entry]) -> Iterator[Protein]:
    """The proteins of records; raises a ValueError at the first record that has a fault."""
    for entry in entries:
        if entry.fault:
            raise ValueError(said(entry))
        yield Protein(entry.identifier, entry.sequence)


def normalized_proteins(
    proteins: Iterable[tuple[str, str]], *, strict: bool = False, max_length: int | None = None
) -> Iterator[Protein]:
    """Identifiers and sequences with only residues in them, as they come; one warning counts the changes.

    Arguments and errors as for `normalize`.
    """
    corrections = Corrections()
    entries = (Entry(*protein) for protein in proteins)
    yield from sound_proteins(normalized_entries(entries, corrections, strict=strict, max_length=max_length))
    corrections.warn()


def normalized(sequences: Iterable[str]) -> Iterator[str]:
    """The same of sequences without identifiers; errors name them by their number, from 1."""
    proteins = ((f"number {number:,}", sequence) for number, sequence in enumerate(sequences, start=1))
    return (protein.sequence for protein in normalized_proteins(proteins))


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
