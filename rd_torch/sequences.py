"""Records of proteins, how their letters become residues, and how they are cut into batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from rd_torch.letters import PROTEIN, Corrections, Kind, read_residues
from rd_torch.levels import SPECIAL_TOKENS

WINDOW_BATCHES: Final = 16
"""Number of batches that a window of records is cut for.

Sequences are sorted by length within a window. In a larger window neighbours are more alike, but a kill loses
more work, and memory holds the whole window. With another number unfinished stores and fits refuse to go on.
"""


class Protein(NamedTuple):
    """A sequence with its identifier."""

    identifier: str
    sequence: str


class Entry(NamedTuple):
    """A record as it comes in, sound or with a fault.

    Attributes:
        identifier: name of the protein, which another record may have too.
        sequence: letters of the protein; empty where the record has a fault.
        source: name of the file that the record comes from; empty where it comes from Python.
        line: line or row of the record in its file, or its number among the items given; counted from 1.
        fault: why the record cannot be embedded; empty where it can.
    """

    identifier: str
    sequence: str
    source: str = ""
    line: int = 0
    fault: str = ""


def describe_fault(entry: Entry) -> str:
    """Return a record's fault, with the record's name and place."""
    place = f" (line {entry.line:,} of {entry.source})" if entry.source else ""
    return f"{entry.fault}, in record {entry.identifier}{place}"


def normalize(
    protein: Protein, corrections: Corrections, *, strict: bool = False, max_length: int | None = None
) -> Protein:
    """Read a protein's letters by `read_residues`, and cut the protein to `max_length`.

    Args:
        protein: the protein.
        corrections: counts of changes, to which those of this protein are added.
        strict: whether to refuse letters that are no residue.
        max_length: number of residues to keep; by default all.

    Returns:
        The protein, with nothing but residues in it.

    Raises:
        ValueError: for a sequence without residues or with characters that are no letters; if strict, for the
            first letter that is no residue, with its position.
    """
    entries = normalize_entries([Entry(*protein)], corrections, strict=strict, max_length=max_length)
    (read,) = require_sound(entries)
    return read


def normalize_entries(
    entries: Iterable[Entry],
    corrections: Corrections,
    *,
    strict: bool = False,
    max_length: int | None = None,
    kind: Kind = PROTEIN,
) -> Iterator[Entry]:
    """Read the letters of records as they come, as `normalize` does.

    Args:
        entries: the records.
        corrections: counts of changes, to which those of these records are added.
        strict: whether to refuse letters that are no residue, and to stop at the first record that cannot be
            read.
        max_length: number of residues to keep of each sequence; by default all.
        kind: what the sequences are of, as the alphabet of a model says.

    Yields:
        Each record, with nothing but residues in it, or with a fault.

    Raises:
        ValueError: if strict, for the first record that cannot be read.
    """
    for entry in entries:
        read = entry if entry.fault else _read(entry, corrections, strict, max_length, kind)
        if read.fault and strict:
            raise ValueError(describe_fault(read))
        yield read


def _read(entry: Entry, corrections: Corrections, strict: bool, max_length: int | None, kind: Kind) -> Entry:
    """Return the record with its residues, or with its fault."""
    try:
        letters = read_residues(entry.sequence, corrections, strict=strict, kind=kind)
    except ValueError as error:
        return entry._replace(sequence="", fault=str(error))
    if max_length is not None and len(letters) > max_length:
        corrections.truncated += 1
        letters = letters[:max_length]
    return entry if letters is entry.sequence else entry._replace(sequence=letters)


def keep_sound(entries: Iterable[Entry], left_out: list[Entry]) -> Iterator[Entry]:
    """Yield the records that can be embedded, and append the others to `left_out`."""
    for entry in entries:
        if entry.fault:
            left_out.append(entry)
        else:
            yield entry


def require_sound(entries: Iterable[Entry]) -> Iterator[Protein]:
    """Yield the proteins of records; raise a ValueError at the first record that has a fault."""
    for entry in entries:
        if entry.fault:
            raise ValueError(describe_fault(entry))
        yield Protein(entry.identifier, entry.sequence)


def normalize_proteins(
    proteins: Iterable[tuple[str, str]],
    *,
    strict: bool = False,
    max_length: int | None = None,
    kind: Kind = PROTEIN,
) -> Iterator[Protein]:
    """Read the letters of proteins as they come, as `normalize` does; one warning counts the changes.

    Args:
        proteins: pairs of identifier and sequence.
        strict: whether to refuse letters that are no residue.
        max_length: number of residues to keep of each sequence; by default all.
        kind: what the sequences are of, as the alphabet of a model says.

    Yields:
        Each protein, with nothing but residues in it.
    """
    corrections = Corrections()
    entries = (Entry(*protein) for protein in proteins)
    read = normalize_entries(entries, corrections, strict=strict, max_length=max_length, kind=kind)
    yield from require_sound(read)
    corrections.warn()


def normalize_sequences(sequences: Iterable[str], kind: Kind = PROTEIN) -> Iterator[str]:
    """Read sequences without identifiers, as `normalize` does; errors name them by their number, from 1."""
    proteins = ((f"number {number:,}", sequence) for number, sequence in enumerate(sequences, start=1))
    return (protein.sequence for protein in normalize_proteins(proteins, kind=kind))


def cut_batches(sequences: Iterable[str], tokens_per_batch: int) -> Iterator[list[tuple[int, str]]]:
    """Cut sequences into batches, in each of which lengths are alike.

    Sequences are sorted by length within a window of about 16 batches, which is what memory holds of them.

    Args:
        sequences: the sequences, read as they are needed.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most; a longer sequence
            makes a batch of its own.

    Yields:
        Each batch as `(index, sequence)` pairs, longest sequence first.

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
    """Sort one window by falling length and cut it into batches."""
    waiting = iter(sorted(window, key=lambda item: -len(item[1])))
    for longest in waiting:
        rows = max(1, tokens_per_batch // (len(longest[1]) + SPECIAL_TOKENS))
        yield [longest, *islice(waiting, rows - 1)]
