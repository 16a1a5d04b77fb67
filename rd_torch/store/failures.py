"""The list beside a store of the records that could not be embedded."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Final

from rd_torch.store.folder import Failure

_COLUMNS: Final = ("identifier", "residues", "reason", "file", "line")


def read_failures(path: Path) -> dict[str, Failure]:
    """What a list has, by identifier; nothing where there is no list."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as handle:
        lines = csv.DictReader(handle, delimiter="\t")  # earlier versions named no file and no line
        return {
            each["identifier"]: Failure(
                int(each["residues"]), each["reason"], each.get("file", ""), int(each.get("line") or 0)
            )
            for each in lines
        }


def write_failures(path: Path, failures: Collection[tuple[str, Failure]]) -> None:
    """Writes the list of records that could not be embedded, as a table; removes it where there are none."""
    path.unlink(missing_ok=True)
    if failures:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
            lines = csv.writer(handle, delimiter="\t", lineterminator="\n")
            lines.writerow(_COLUMNS)
            lines.writerows(
                (name, why.residues, why.reason, why.source, why.line or "") for name, why in failures
            )
