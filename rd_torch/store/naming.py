"""Names of records: each has one of its own, and none leads out of its file or folder."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable
from typing import Final

_LONGEST_DATASET: Final = 32_000
"""Bytes that the name of a dataset takes at most; HDF5 has no room for more than 64 KiB."""

_LONGEST_FILE: Final = 200
"""Bytes that the name of a file takes at most; most file systems end at 255, and a suffix follows."""


def dataset_name(identifier: str) -> str:
    """Name a record's dataset in HDF5.

    `/`, `%` and control characters become `%2F` and so on, a lone `.` becomes `%2E`, and an empty identifier
    becomes `%`.

    Args:
        identifier: the record's identifier.

    Returns:
        The name; its start and a digest where it would be longer than HDF5 allows.
    """
    name = re.sub(r"[/%\x00-\x1f\x7f]", _escaped, identifier)
    return "%2E" if name == "." else _shortened(name or "%", _LONGEST_DATASET)


def file_name(identifier: str) -> str:
    """Name a record's file as `dataset_name` names its dataset.

    A leading `.` and backslashes are escaped too.

    Args:
        identifier: the record's identifier.

    Returns:
        The name without suffix; its start and a digest where file systems have no room for more.
    """
    name = re.sub(r"^\.|[/\\%\x00-\x1f\x7f]", _escaped, identifier)
    return _shortened(name or "%", _LONGEST_FILE)


def identifier_of(name: str) -> str:
    """Return the identifier of a record that has this name, unless the name was shortened."""
    return "" if name == "%" else re.sub(r"%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), name)


def _escaped(match: re.Match[str]) -> str:
    """Return a character as `%` and its number."""
    return f"%{ord(match[0]):02X}"


def _shortened(name: str, longest: int) -> str:
    """Return the name itself, or, where it is too long, its start and a digest of the whole."""
    data = name.encode()
    if len(data) <= longest:
        return name
    digest = hashlib.sha256(data).hexdigest()
    return f"{data[: longest - len(digest) - 1].decode(errors='ignore')}~{digest}"


class Names:
    """Gives every record a name of its own: the second `P1` is called `P1#2`, the third `P1#3`.

    The names that are taken stand in a temporary database on disk, so that memory does not grow with the
    number of records.

    Args:
        key: what must differ between two names; a format's `key`.

    Attributes:
        renamed: number of records whose name is not their identifier.
    """

    def __init__(self, key: Callable[[str], str]) -> None:
        self._key = key
        self._taken = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._taken.execute("CREATE TABLE taken (key BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._taken.execute("BEGIN")  # and never committed, which is faster: nobody else reads it
        self.renamed = 0

    def take(self, identifier: str) -> str:
        """Take a name for the next record: its identifier, or, where that is taken, with the next number."""
        name, times = identifier, self._count(identifier)
        while times > 1:
            name = f"{identifier}#{times}"
            times = times + 1 if self._count(name) > 1 else 1
        self.renamed += name != identifier
        return name

    def _count(self, name: str) -> int:
        """Take a name; returns how often it has been asked for, this time included."""
        key = hashlib.blake2b(self._key(name).encode(), digest_size=16).digest()
        query = "INSERT INTO taken VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times"
        (times,) = self._taken.execute(query, (key,)).fetchone()
        return int(times)
