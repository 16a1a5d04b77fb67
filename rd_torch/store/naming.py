"""Names of records: each its own, and none that leaves its file or folder."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable
from typing import Final

_LONGEST_DATASET: Final = 32_000
"""Bytes; HDF5 ends at 64 KiB."""

_LONGEST_FILE: Final = 200
"""Bytes; most file systems end at 255, and a suffix follows."""


def dataset_name(identifier: str) -> str:
    """The HDF5 name of an identifier: `/`, `%` and control characters as `%2F` and so on.

    A lone `.` is `%2E`, an empty identifier `%`.
    """
    name = re.sub(r"[/%\x00-\x1f\x7f]", _escaped, identifier)
    return "%2E" if name == "." else _shortened(name or "%", _LONGEST_DATASET)


def file_name(identifier: str) -> str:
    """The file name of an identifier, without suffix: a leading `.` and backslashes are escaped too."""
    name = re.sub(r"^\.|[/\\%\x00-\x1f\x7f]", _escaped, identifier)
    return _shortened(name or "%", _LONGEST_FILE)


def identifier_of(name: str) -> str:
    """The identifier that was named so, unless it was shortened."""
    return "" if name == "%" else re.sub(r"%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), name)


def _escaped(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"


def _shortened(name: str, longest: int) -> str:
    """A name that is too long as its start and a digest of the whole."""
    data = name.encode()
    if len(data) <= longest:
        return name
    digest = hashlib.sha256(data).hexdigest()
    return f"{data[: longest - len(digest) - 1].decode(errors='ignore')}~{digest}"


class Names:
    """Gives every record a name of its own: the second `P1` is `P1#2`, the third `P1#3`.

    What is taken stands in a temporary file, so memory does not grow with the number of records.

    Args:
        key: what must differ between names.
    """

    def __init__(self, key: Callable[[str], str]) -> None:
        self._key = key
        self._taken = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._taken.execute("CREATE TABLE taken (key BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._taken.execute("BEGIN")  # never committed: nobody else reads it
        self.renamed = 0

    def unique(self, identifier: str) -> str:
        """The identifier itself where nobody has it, else with the first number that is free."""
        name, times = identifier, self._take(identifier)
        while times > 1:
            name = f"{identifier}#{times}"
            times = times + 1 if self._take(name) > 1 else 1
        self.renamed += name != identifier
        return name

    def _take(self, name: str) -> int:
        """How often the name has been asked for, this time included."""
        key = hashlib.blake2b(self._key(name).encode(), digest_size=16).digest()
        query = "INSERT INTO taken VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times"
        (times,) = self._taken.execute(query, (key,)).fetchone()
        return int(times)
