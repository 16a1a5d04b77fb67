"""FASTA as it is found: records, comments, and what must not be taken for residues."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

from rd_torch.letters import BLANKS, LETTERS, require_letters
from rd_torch.reading.text import as_latin_1
from rd_torch.sequences import Entry

Naming: TypeAlias = Callable[[str], str]
"""Makes an identifier of a header; raises a ValueError where the header has none."""

COMMENTS: Final = (";", "#", "!")
"""What a comment line begins with, as BLAST and the first FASTA programs have it."""

MARKS: Final = f"\ufeff{BLANKS}"
"""Blanks, and byte order marks, which stand in the middle where files were joined."""

MISSING_IN_FILES: Final = frozenset(("NA", "NULL"))
"""Missing values that files spell with letters of residues, beside those that no string may have."""

_PIR: Final = re.compile(r"(P1|F1|D[LC]|R[LC]|N[13]|XX);")
_UNIPROT: Final = re.compile(r"(?:sp|tr|up)\|([^|\s]+)\|")


def naming(rule: str) -> Naming:
    """What makes identifiers of headers.

    Args:
        rule: `"word"`, the first word; `"header"`, the whole line; `"uniprot"`, the accession of
            `sp|ACCESSION|NAME`; or a regular expression, of which the first group is taken, or all of it.

    Raises:
        ValueError: for what is no regular expression.
    """
    if rule == "word":
        return _first_word
    if rule == "header":
        return _whole
    try:
        pattern = _UNIPROT if rule == "uniprot" else re.compile(rule)
    except re.error as error:
        raise ValueError(
            f"expected the identifier as word, header, uniprot or a regular expression, got {rule!r}: {error}"
        ) from error

    def found(header: str) -> str:
        """The part of the header that the pattern finds."""
        match = pattern.search(header)
        name = match and (match[1] if pattern.groups else match[0])
        if not name:
            raise ValueError(f"expected a header in which {pattern.pattern!r} is found, got {header[:80]!r}")
        return name

    return found


def _first_word(header: str) -> str:
    words = header.replace("\x01", " ").split()  # parts the headers of one record of NCBI's nr
    if not words:
        raise ValueError("expected an identifier behind '>', got none")
    return words[0]


def _whole(header: str) -> str:
    if not header:
        raise ValueError("expected an identifier behind '>', got none")
    return header


def read_fasta(lines: Iterable[str], source: str, name: Naming) -> Iterator[Entry]:
    """The records of a FASTA file, each with the line of its header.

    A record that is not one without doubt comes with its fault and without a sequence.

    Args:
        lines: of the file.
        source: what it is called.
        name: makes identifiers of headers.

    Raises:
        ValueError: where the first line that is neither blank nor a comment starts no record.
    """
    header, first, body = "", 0, list[str]()
    for number, line in enumerate(lines, start=1):
        if line.startswith(">"):
            if first:
                yield from _records(header, body, source, first, name)
            header, first, body = line, number, []
        elif first:
            body.append(line)
        elif (text := line.strip(MARKS)).startswith(">"):
            header, first = text, number
        elif text and not text.startswith(COMMENTS):
            raise ValueError(
                f"expected a FASTA file, whose first line starts with '>', got {text[:40]!r} in {source}"
            )
    if first:
        yield from _records(header, body, source, first, name)


def _records(header: str, body: list[str], source: str, first: int, name: Naming) -> Iterator[Entry]:
    """The record of a header and the lines below it; of several where one begins in the midst of them."""
    text = "".join(body)
    if " " not in text and _ONLY_LETTERS.issuperset(text):
        yield _entry(header, text.replace("\n", ""), source, first, name)
        return
    letters, fault = list[str](), ""
    for number, line in enumerate((each.strip(MARKS) for each in body), start=first + 1):
        if line.startswith(">"):
            yield _entry(header, "".join(letters), source, first, name, fault)
            header, first, letters, fault = line, number, [], ""
        elif line and not line.startswith(COMMENTS):
            fault = fault or _fault_of(line, number)
            letters.append("" if fault else "".join(line.split()))
            before, mark, _ = line.partition(">")
            if mark and _LETTERS_AND_BLANKS.issuperset(before):  # the record behind it is in doubt as well
                yield _entry(header, "", source, first, name, fault)
                header, first, letters = line[len(before) :], number, []
                fault = f"expected '>' at the start of a line, got it within line {number:,}"
    yield _entry(header, "".join(letters), source, first, name, fault)


_ONLY_LETTERS: Final = LETTERS | {"\n"}
_JOINED: Final = ": is a line break missing, or the end of a file that others were joined to?"
_LETTERS_AND_BLANKS: Final = LETTERS | set(BLANKS)


def _fault_of(line: str, number: int) -> str:
    """Why a line is no part of a sequence; nothing where it is."""
    try:
        require_letters(line)
    except ValueError as error:
        joined = _JOINED if "got '>'" in str(error) else ""
        return f"{error} in line {number:,}{joined}"
    return ""


def _entry(header: str, letters: str, source: str, line: int, name: Naming, fault: str = "") -> Entry:
    """One record, checked for an identifier and a sequence."""
    header = as_latin_1(header[1:].strip(MARKS))
    try:
        identifier = name(header)
    except ValueError as error:
        identifier, fault = (header.split() or [f"line {line}"])[0], str(error)
    if _PIR.match(header):
        fault = "expected FASTA, got a record in the format of PIR, whose second line is a title: convert it"
    if not letters.strip(f"*{BLANKS}") and not fault:
        fault = "expected a sequence, got none"
    if letters in MISSING_IN_FILES:
        fault = f"expected a sequence, got {letters!r}, which stands for a missing one"
    return Entry(identifier, "" if fault else letters, source, line, fault)
