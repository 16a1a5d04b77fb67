"""The list beside a store of the records that could not be embedded."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple, Self

from rd_torch.sequences import Entry

_COLUMNS: Final = ("identifier", "residues", "reason", "file", "line")


class Failure(NamedTuple):
    """A record that could not be embedded.

    Attributes:
        residues: number of its residues; 0 where it could not be read.
        reason: why it could not be embedded.
        source: the file that it comes from, if any.
        line: the line where it stands in the file, or its number among what was given, from 1; 0 where that
            is not known.
    """

    residues: int
    reason: str
    source: str = ""
    line: int = 0

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """Return the failure of a record that cannot be read."""
        return cls(0, entry.fault, entry.source, entry.line)


def failure_list(output: Path) -> Path:
    """Return the file `<output>.failed.tsv`, which lists the records that an output lacks."""
    return output.with_name(f"{output.name}.failed.tsv")


def read_failures(path: Path) -> dict[str, Failure]:
    """Read a list of failures, by identifier; empty where there is no list."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as handle:
        rows = csv.DictReader(handle, delimiter="\t")  # earlier versions named no file and no line
        return {
            row["identifier"]: Failure(
                int(row["residues"]), row["reason"], row.get("file", ""), int(row.get("line") or 0)
            )
            for row in rows
        }


def write_failures(path: Path, failures: Collection[tuple[str, Failure]]) -> None:
    """Write a list of failures as a table; remove it where there are none.

    Args:
        path: the list.
        failures: identifiers and failures, in the order in which they are listed.
    """
    path.unlink(missing_ok=True)
    if failures:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
            table = csv.writer(handle, delimiter="\t", lineterminator="\n")
            table.writerow(_COLUMNS)
            table.writerows(
                (identifier, failure.residues, failure.reason, failure.source, failure.line or "")
                for identifier, failure in failures
            )
