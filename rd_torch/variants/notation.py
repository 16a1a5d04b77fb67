"""Read the notations of variants: `A24G`, `A24G:L30V`, `p.Ala24Gly` and their relatives; refuse the others.

This file knows how variants are written, and no wild type: `variant.py` holds them against one.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

THREE_LETTERS: Final = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E", "GLY": "G",
    "HIS": "H", "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F", "PRO": "P", "SER": "S",
    "THR": "T", "TRP": "W", "TYR": "Y", "VAL": "V", "SEC": "U", "PYL": "O", "ASX": "B", "GLX": "Z",
    "XAA": "X", "TER": "*",
}  # fmt: skip
"""One letter for three, in capitals; `*` is a stop."""

UNCHANGED: Final = "="
"""What stands for the new letter where the residue stays as it is."""

_WILD_TYPES: Final = frozenset(
    ("wt", "_wt", "wild-type", "wildtype", "wild_type", "wild type", "=", "p.=", "p.(=)", "_sy")
)
"""How tables write the wild type, in lower case; `_sy` is a change of DNA that changes no residue."""

_MISSING: Final = frozenset(("", "na", "n/a", "nan", "none", "null", "<na>", "#n/a", "-"))

# Accessions of RefSeq, Ensembl, LRG and UniProt, and no other word: a variant before `:p.` must not be lost.
_REFERENCE: Final = re.compile(
    r"(?P<reference>(?:[NXYWA][PMRCG]_\d+(?:\.\d+)?|ENS[A-Z]*\d+(?:\.\d+)?|LRG_\d+(?:[pt]\d+)?"
    r"|[OPQ]\d[A-Z0-9]{3}\d(?:-\d+)?|[A-NR-Z]\d(?:[A-Z][A-Z0-9]{2}\d){1,2}(?:-\d+)?)"
    r"(?:\([\w-]+\))?):(?=[a-z]\.)"
)
_OTHER_MOLECULE: Final = re.compile(r"[cgmnor]\.")
_SEPARATOR: Final = re.compile(r"\s*[:,;/_+]\s*|\s+")
_CHANGE: Final = re.compile(
    r"(?P<wild>[A-Za-z]{3}|[A-Za-z*])(?P<number>-?\d+)(?P<mutant>[A-Za-z]{3}|[A-Za-z]|[*=?-])"
)

# What the text says of a change that is no substitution, where it follows a position.
_OTHER_CHANGES: Final = (
    (re.compile(r"\d[A-Za-z]{0,3}fs"), "a frameshift"),
    (re.compile(r"\d(?:[A-Za-z*]{0,3})ext"), "an extension of the protein"),
    (re.compile(r"\ddelins"), "a deletion with an insertion"),
    (re.compile(r"\ddel"), "a deletion"),
    (re.compile(r"\dins"), "an insertion"),
    (re.compile(r"\ddup"), "a duplication"),
    (re.compile(r"\d\["), "a repeat"),
)


class Change(NamedTuple):
    """One substitution as it is written.

    Attributes:
        wild: the letter that the wild type is said to have.
        number: the position as it is written.
        mutant: the new letter; the same as `wild` where the residue is said to stay.
    """

    wild: str
    number: int
    mutant: str


class Written(NamedTuple):
    """A variant as it is written.

    Attributes:
        changes: its substitutions, in the order of the text; none for the wild type.
        reference: the accession before `:p.` in HGVS; empty where there is none.
    """

    changes: tuple[Change, ...]
    reference: str = ""


def read_notation(text: str) -> Written:
    """Read a variant of a protein.

    Substitutions are written with one letter (`A24G`) or three (`Ala24Gly`), in capitals or not, and as HGVS
    has them (`p.Ala24Gly`, `p.(Ala24Gly)`, `p.A24G`, `NP_000305.3:p.Ala24Gly`). Several stand behind each
    other with `:`, `,`, `;`, `/`, `_`, `+` or blanks between them, or as `p.[Ala24Gly;Leu30Val]`. `A24A` and
    `p.Ala24=` change nothing, and `WT`, `_wt`, `_sy`, `p.=` and `=` are the wild type itself.

    Args:
        text: the variant.

    Returns:
        Its substitutions.

    Raises:
        ValueError: for a text without a variant, a change of DNA or RNA, a stop, a deletion, an insertion and
            any other change that is no substitution, alleles of two chromosomes, and a new letter that is no
            amino acid; the message says which it is.
    """
    inner = text.strip()
    if inner.lower() in _MISSING:
        raise ValueError(f"expected a variant, got {text!r}")
    if inner.lower() in _WILD_TYPES:
        return Written(())
    reference = ""
    if found := _REFERENCE.match(inner):
        reference, inner = found["reference"], inner[found.end() :]
        if inner.lower() in _WILD_TYPES:
            return Written((), reference)
    if _OTHER_MOLECULE.match(inner):
        raise ValueError(f"expected a variant of a protein, got one of DNA or RNA: {text!r}")
    inner = _without_brackets(inner.removeprefix("p."), text)
    for pattern, what in _OTHER_CHANGES:
        if pattern.search(inner):
            raise ValueError(f"expected substitutions alone, got {what}: {text!r}")
    return Written(tuple(_read_change(part, text) for part in _SEPARATOR.split(inner)), reference)


def _without_brackets(inner: str, text: str) -> str:
    """Return substitutions without the brackets around all of them; refuse alleles and unknown phases."""
    if "];[" in inner or "(;)" in inner or "|" in inner:
        raise ValueError(
            f"expected substitutions of one protein, got some that may be on two chromosomes: {text!r}"
        )
    for opening, closing in ("[]", "()"):
        if inner.startswith(opening) and inner.endswith(closing) and inner.count(opening) == 1:
            inner = inner[1:-1]
    return inner


def _read_change(part: str, text: str) -> Change:
    """Read one substitution; `text` is the whole variant, for the error."""
    bare = part.removeprefix("p.")
    bare = bare[1:-1] if bare.startswith("(") and bare.endswith(")") else bare
    found = _CHANGE.fullmatch(bare)
    if found is None:
        raise ValueError(
            f"expected substitutions such as A24G or Ala24Gly, got {part!r}"
            f"{'' if part == text.strip() else f' in {text!r}'}"
        )
    wild, mutant = _letter_of(found["wild"], text), found["mutant"]
    mutant = wild if mutant == UNCHANGED else _letter_of(mutant, text)
    if wild == "*" or mutant == "*":
        raise ValueError(f"expected an amino acid for another, got a stop: {text!r}")
    if mutant == "-":
        raise ValueError(f"expected substitutions alone, got a deletion: {text!r}")
    if mutant != wild and mutant in "BXZ?":
        why = ", which is unknown, or a stop in old tables" if mutant == "X" else ", which is none"
        raise ValueError(f"expected an amino acid as the new letter, got {mutant}{why}: {text!r}")
    return Change(wild, int(found["number"]), mutant)


def _letter_of(code: str, text: str) -> str:
    """Return the one letter of a code of one letter or three, or the sign that stands in its place."""
    if len(code) == 1:
        if code.upper() == "J":
            raise ValueError(f"expected letters of amino acids, got J: {text!r}")
        return code.upper()
    if code.upper() not in THREE_LETTERS:
        raise ValueError(f"expected the three letters of an amino acid, got {code!r}: {text!r}")
    return THREE_LETTERS[code.upper()]
