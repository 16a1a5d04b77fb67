"""The letters of proteins, and the one function that reads a string as a sequence, wherever it comes from."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from string import ascii_letters
from typing import Final, NamedTuple

RESIDUE_LETTERS: Final = "LAGVSERTIDPKQNFYMHWCXBUZO"
"""The letters that are residues, in the order of their ids, 4 to 28."""

BLANKS: Final = " \t\n\r\v\f\u00a0"
"""Characters that may stand between letters and mean nothing."""

LETTERS: Final = frozenset(ascii_letters + "-.*")
"""Characters that may stand in a sequence as people write it."""

MISSING: Final = frozenset(("nan", "NaN", "None", "none", "null", "Null"))
"""How programs write a missing value, where that is spelled with letters; "NA" may be two residues."""


class Kind(NamedTuple):
    """What sequences are made of.

    Attributes:
        name: what they are.
        letters: the letters of their residues.
        unknown: the letter that every other letter becomes.
        alike: letters that mean a residue of theirs, but are not its letter, and that letter.
    """

    name: str
    letters: str
    unknown: str
    alike: tuple[str, str] = ("", "")


PROTEIN: Final = Kind("protein", RESIDUE_LETTERS, "X")
DNA: Final = Kind("DNA", "ACGTN", "N", ("U", "T"))
RNA: Final = Kind("RNA", "ACGUN", "N", ("T", "U"))

_RESIDUES: Final = {kind.name: frozenset(kind.letters) for kind in (PROTEIN, DNA, RNA)}

_PROTEINS_ALONE: Final = frozenset("EFILPQ")
"""Letters of amino acids that stand for no nucleotide and no set of nucleotides."""

_NUCLEOTIDES: Final = frozenset("ACGTUN-.*")
_LONGEST_PROTEIN_OF_NUCLEOTIDES: Final = 39
"""Residues of the longest sequence of nucleotide letters that may be a protein.

Alanine, cysteine, glycine and threonine alone make short peptides, but no longer proteins.
"""
_WRITTEN: Final = LETTERS | frozenset(BLANKS)
_PARTED: Final = re.compile(rf"[^{BLANKS}]+")


@dataclass
class Corrections:
    """Counts of what was changed when sequences were read.

    Attributes:
        stops: number of sequences that lost a `*` at the end.
        unknown: number of letters that are no residue and became X.
        truncated: number of sequences that were cut to the maximal length.
        nucleotides: number of letters that are no nucleotide and became N.
    """

    stops: int = 0
    unknown: int = 0
    truncated: int = 0
    nucleotides: int = 0

    def warn(self) -> None:
        """Issue one warning that counts every kind of change; issue none where nothing changed."""
        kinds = (
            (self.stops, "sequences whose '*' at the end was dropped"),
            (self.unknown, "letters that are no residue, read as X"),
            (self.nucleotides, "letters that are no nucleotide, read as N"),
            (self.truncated, "sequences cut to the maximal length"),
        )
        changes = [f"{what}: {count:,}" for count, what in kinds if count]
        if changes:
            warnings.warn("; ".join(changes), stacklevel=3)


def require_letters(text: str) -> None:
    """Require that a text is a sequence as people write one.

    That is ASCII letters, `-`, `.` and `*`, with blanks and line breaks between them. Words are no sequence,
    although they are spelled with the same letters: a line with lower-case letters in pieces of unequal
    length, such as "Sequence unavailable" in files of BioMart, is refused.

    Args:
        text: one or several lines.

    Raises:
        ValueError: for another character, with its position, or for words.
    """
    if not _WRITTEN.issuperset(text):
        place, letter = next((place, each) for place, each in enumerate(text) if each not in _WRITTEN)
        raise ValueError(f"expected letters, '-', '.' or '*', got {letter!r} at position {place + 1:,}")
    for line in text.splitlines():
        pieces = _PARTED.findall(line)
        if len(pieces) > 1 and not line.isupper() and not _are_blocks(pieces):
            raise ValueError(f"expected a sequence, got words: {line.strip(BLANKS)[:60]!r}")


def _are_blocks(pieces: list[str]) -> bool:
    """Tell whether pieces have one length, as in a sequence printed in blocks; the last may be shorter."""
    length = len(pieces[0])
    return all(len(piece) == length for piece in pieces[:-1]) and len(pieces[-1]) <= length


def _require_protein(letters: str) -> None:
    """Raise a ValueError for a nucleic acid: a file of genes is easily taken for one of their proteins."""
    if len(letters) > _LONGEST_PROTEIN_OF_NUCLEOTIDES and _NUCLEOTIDES.issuperset(letters):
        bases = sorted(set(letters) - set("-.*"))
        if {"A", "C", "G"}.issubset(bases):
            raise ValueError(
                f"expected the sequence of a protein, got {len(letters):,} letters that are all nucleotides "
                f"({', '.join(bases)}): translate it first"
            )


def _require_nucleic(letters: str, kind: Kind) -> None:
    """Raise a ValueError for a protein, where a nucleic acid is wanted."""
    place = next((place for place, letter in enumerate(letters) if letter in _PROTEINS_ALONE), None)
    if place is not None:
        raise ValueError(
            f"expected the sequence of {kind.name}, got {letters[place]!r} at position {place + 1:,}, which "
            "stands in proteins alone: take a model of proteins"
        )


def read_residues(
    text: str, corrections: Corrections, *, strict: bool = False, gaps: str = "", kind: Kind = PROTEIN
) -> str:
    """Read a sequence as people write it.

    Blanks, line breaks and a `*` at the end are dropped, and lower case is read as upper. Every other letter
    that is no residue (J, `-`, `.`, an inner `*`) becomes X. Forty or more letters that all are nucleotides
    are DNA or RNA, and are refused. For models of nucleic acids, other letters become N, U and T are read as
    the one that the model knows, and proteins are refused.

    Args:
        text: the sequence.
        corrections: counts of changes, to which those of this sequence are added.
        strict: whether to refuse letters that are no residue.
        gaps: characters that stay as they are, for a caller who has tokens for them.
        kind: what the sequence is of.

    Returns:
        The residues, one upper-case letter each.

    Raises:
        ValueError: for a text that is no sequence or has no residues, with the first character that does not
            belong; if strict, for the first letter that is no residue, with its position.
    """
    residues = _RESIDUES[kind.name]
    if text and residues.issuperset(text):
        if kind == PROTEIN:
            _require_protein(text)
        return text
    require_letters(text)
    letters = "".join(_PARTED.findall(text))
    if letters in MISSING:
        raise ValueError(f"expected a sequence, got {letters!r}, which stands for a missing one")
    letters = letters.upper()
    if letters.endswith("*"):
        letters = letters[:-1]
        corrections.stops += 1
    if not letters.strip("*"):
        raise ValueError("expected a sequence, got none")
    if kind == PROTEIN:
        _require_protein(letters)
    else:
        _require_nucleic(letters, kind)
        letters = letters.replace(*kind.alike)
    known = residues.union(gaps)
    return (
        letters if known.issuperset(letters) else _replace_unknown(letters, known, corrections, strict, kind)
    )


def _replace_unknown(
    letters: str, known: frozenset[str], corrections: Corrections, strict: bool, kind: Kind
) -> str:
    """Return letters with those that are no residue replaced, or raise a ValueError if strict."""
    places = [place for place, letter in enumerate(letters) if letter not in known]
    if strict:
        raise ValueError(
            f"expected residues ({''.join(sorted(kind.letters))}), got {letters[places[0]]!r} at position "
            f"{places[0] + 1:,}"
        )
    if kind == PROTEIN:
        corrections.unknown += len(places)
    else:
        corrections.nucleotides += len(places)
    return "".join(letter if letter in known else kind.unknown for letter in letters)
