"""The letters of proteins, and the one reading of a string as a sequence, whichever door it comes in by."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from string import ascii_letters
from typing import Final

RESIDUE_LETTERS: Final = "LAGVSERTIDPKQNFYMHWCXBUZO"
"""The letters that are residues, in the order of their ids, 4 to 28."""

BLANKS: Final = " \t\n\r\v\f\u00a0"
"""What may stand between letters and says nothing."""

LETTERS: Final = frozenset(ascii_letters + "-.*")
"""What may stand in a sequence."""

MISSING: Final = frozenset(("nan", "NaN", "None", "none", "null", "Null"))
"""How programs write a value that is not there, spelled with letters of residues; "NA" is two residues."""

_RESIDUES: Final = frozenset(RESIDUE_LETTERS)
_NUCLEOTIDES: Final = frozenset("ACGTUN-.*")
_LONGEST_PROTEIN_OF_NUCLEOTIDES: Final = 39
"""Alanine, cysteine, glycine and threonine alone make short peptides, never longer proteins."""
_WRITTEN: Final = LETTERS | frozenset(BLANKS)
_PARTED: Final = re.compile(rf"[^{BLANKS}]+")


@dataclass
class Corrections:
    """Counts of what was changed when sequences were read."""

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


def require_letters(text: str) -> None:
    """Raises a ValueError unless lines of text are of a sequence as people write one.

    That is ASCII letters, `-`, `.` and `*`, which blanks and line breaks may part. Words are no sequence,
    although they are spelled with the same letters: a line with lower-case letters in pieces of unequal
    length, such as the "Sequence unavailable" of BioMart.
    """
    if not _WRITTEN.issuperset(text):
        place, letter = next((place, each) for place, each in enumerate(text) if each not in _WRITTEN)
        raise ValueError(f"expected letters, '-', '.' or '*', got {letter!r} at position {place + 1:,}")
    for line in text.splitlines():
        pieces = _PARTED.findall(line)
        if len(pieces) > 1 and not line.isupper() and not _are_blocks(pieces):
            raise ValueError(f"expected a sequence, got words: {line.strip(BLANKS)[:60]!r}")


def _are_blocks(pieces: list[str]) -> bool:
    """Whether pieces are of one length, as sequences are printed in blocks; the last may be shorter."""
    length = len(pieces[0])
    return all(len(piece) == length for piece in pieces[:-1]) and len(pieces[-1]) <= length


def _require_protein(letters: str) -> None:
    """Raises a ValueError for a nucleic acid: a gene's file is easily taken for its protein's."""
    if len(letters) > _LONGEST_PROTEIN_OF_NUCLEOTIDES and _NUCLEOTIDES.issuperset(letters):
        bases = sorted(set(letters) - set("-.*"))
        if {"A", "C", "G"}.issubset(bases):
            raise ValueError(
                f"expected the sequence of a protein, got {len(letters):,} letters that are all nucleotides "
                f"({', '.join(bases)}): translate it first"
            )


def read_residues(text: str, corrections: Corrections, *, strict: bool = False, gaps: str = "") -> str:
    """The residues of a sequence as people write it.

    Blanks, line breaks and a `*` at the end are dropped, and lower case is read as upper. Every other letter
    that is no residue (J, `-`, `.`, an inner `*`) becomes X. Forty or more letters of which all are
    nucleotides are DNA or RNA, and refused.

    Args:
        text: the sequence.
        corrections: receives the counts of what was changed.
        strict: refuse letters that are no residue.
        gaps: signs that stay as they are, where somebody has a token for them.

    Raises:
        ValueError: for a text that is no sequence or has no residues, with the first character that does not
            belong; when strict, for the first letter that is no residue, with its position.
    """
    if text and _RESIDUES.issuperset(text):
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
    _require_protein(letters)
    known = _RESIDUES.union(gaps)
    if not known.issuperset(letters):
        places = [place for place, letter in enumerate(letters) if letter not in known]
        if strict:
            raise ValueError(
                f"expected residues ({''.join(sorted(_RESIDUES))}), got {letters[places[0]]!r} at position "
                f"{places[0] + 1:,}"
            )
        corrections.unknown += len(places)
        letters = "".join(letter if letter in known else "X" for letter in letters)
    return letters
