"""Read FASTA as it is found, with comments in it and with lines that must not be taken for residues."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

from rd_torch.letters import BLANKS, LETTERS, require_letters
from rd_torch.reading.text import as_latin_1
from rd_torch.sequences import Entry

IdentifierRule: TypeAlias = Callable[[str], str]
"""Finds the identifier in a header; raises a ValueError where the header has none."""

COMMENTS: Final = (";", "#", "!")
"""Characters that begin a comment line in files for BLAST and for the first FASTA programs."""

MARKS: Final = f"\ufeff{BLANKS}"
"""Blanks and byte order marks; a mark stands in the middle where files were joined."""

MISSING_IN_FILES: Final = frozenset(("NA", "NULL"))
"""Missing values that only files spell with letters of residues; in Python "NA" may be two residues."""

_PIR: Final = re.compile(r"(P1|F1|D[LC]|R[LC]|N[13]|XX);")
_UNIPROT: Final = re.compile(r"(?:sp|tr|up)\|([^|\s]+)\|")


def compile_rule(rule: str) -> IdentifierRule:
    """Make the function that finds identifiers in headers.

    Args:
        rule: `"word"` for the first word; `"header"` for the whole line; `"uniprot"` for the accession in
            `sp|ACCESSION|NAME`; or a regular expression, for what its first group matches, or all of it where
            it has no group.

    Returns:
        The function.

    Raises:
        ValueError: for a rule that is no regular expression.
    """
    if rule == "word":
        return _first_word
    if rule == "header":
        return _whole_header
    try:
        pattern = _UNIPROT if rule == "uniprot" else re.compile(rule)
    except re.error as error:
        raise ValueError(
            f"expected the identifier as word, header, uniprot or a regular expression, got {rule!r}: {error}"
        ) from error

    def find(header: str) -> str:
        """Return the part of the header that the pattern finds."""
        match = pattern.search(header)
        name = match and (match[1] if pattern.groups else match[0])
        if not name:
            raise ValueError(f"expected a header in which {pattern.pattern!r} is found, got {header[:80]!r}")
        return name

    return find


def _first_word(header: str) -> str:
    words = header.replace("\x01", " ").split()  # NCBI's nr puts it between the headers of one record
    if not words:
        raise ValueError("expected an identifier after '>', got none")
    return words[0]


def _whole_header(header: str) -> str:
    if not header:
        raise ValueError("expected an identifier after '>', got none")
    return header


def read_fasta(lines: Iterable[str], source: str, identify: IdentifierRule) -> Iterator[Entry]:
    """Read the records of a FASTA file.

    Args:
        lines: lines of the file.
        source: name of the file in messages.
        identify: finds the identifier in a header.

    Yields:
        Each record, with the line of its header. A record that is in any doubt has a fault and no sequence.

    Raises:
        ValueError: where the first line that is neither blank nor a comment starts no record.
    """
    header, first, body = "", 0, list[str]()
    for number, line in enumerate(lines, start=1):
        if line.startswith(">"):
            if first:
                yield from _records(header, body, source, first, identify)
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
        yield from _records(header, body, source, first, identify)


def _records(
    header: str, body: list[str], source: str, first: int, identify: IdentifierRule
) -> Iterator[Entry]:
    """Yield the record of a header and the lines below it; several where one begins amid those lines."""
    text = "".join(body)
    # The short way, for nearly all records: their lines are letters alone. Below, lines are read one by one.
    if " " not in text and _ONLY_LETTERS.issuperset(text):
        yield _entry(header, text.replace("\n", ""), source, first, identify)
        return
    letters, fault = list[str](), ""
    for number, line in enumerate((each.strip(MARKS) for each in body), start=first + 1):
        if line.startswith(">"):
            yield _entry(header, "".join(letters), source, first, identify, fault)
            header, first, letters, fault = line, number, [], ""
        elif line and not line.startswith(COMMENTS):
            fault = fault or _fault_of(line, number)
            letters.append("" if fault else "".join(line.split()))
            before, mark, _ = line.partition(">")
            if mark and _LETTERS_AND_BLANKS.issuperset(before):  # the record after it is in doubt as well
                yield _entry(header, "", source, first, identify, fault)
                header, first, letters = line[len(before) :], number, []
                fault = f"expected '>' at the start of a line, got it within line {number:,}"
    yield _entry(header, "".join(letters), source, first, identify, fault)


_ONLY_LETTERS: Final = LETTERS | {"\n"}
_JOINED: Final = ": is a line break missing, or the end of a file that others were joined to?"
_LETTERS_AND_BLANKS: Final = LETTERS | set(BLANKS)


def _fault_of(line: str, number: int) -> str:
    """Return why a line is no part of a sequence; an empty string where it is one."""
    try:
        require_letters(line)
    except ValueError as error:
        joined = _JOINED if "got '>'" in str(error) else ""
        return f"{error} in line {number:,}{joined}"
    return ""


def _entry(
    header: str, letters: str, source: str, line: int, identify: IdentifierRule, fault: str = ""
) -> Entry:
    """Make one record, and check that it has an identifier and a sequence."""
    header = as_latin_1(header[1:].strip(MARKS))
    try:
        identifier = identify(header)
    except ValueError as error:
        identifier, fault = (header.split() or [f"line {line}"])[0], str(error)
    if _PIR.match(header):
        fault = "expected FASTA, got a record in the format of PIR, whose second line is a title: convert it"
    if not letters.strip(f"*{BLANKS}") and not fault:
        fault = "expected a sequence, got none"
    if letters in MISSING_IN_FILES:
        fault = f"expected a sequence, got {letters!r}, which stands for a missing one"
    return Entry(identifier, "" if fault else letters, source, line, fault)
