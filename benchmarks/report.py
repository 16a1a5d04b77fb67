"""Writes the page `benchmarks/results/README.md`, which holds the tables of all result files.

    python -m benchmarks.report

Run it after a benchmark has written a file to `benchmarks/results/`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.result import command, table

HERE = Path(__file__).parent
FOLDER = HERE / "results"
HEAD = """# Results of the benchmarks

This page is written by `python -m benchmarks.report` from the JSON files in this folder and below. Each table
stands below the command that makes it, and above the machine and the versions that its figures belong to.
[The guide](../README.md) says what each command asks, what was found, and what was decided from it.

"""


def command_of_today(recorded: str) -> str:
    """Return the command that makes a result today.

    A result records the command that made it. Some were made when all scripts lay in one folder and were run
    as files; such a script has kept its name and its arguments.

    Args:
        recorded: The command in the result file.
    """
    old = re.match(r"python benchmarks/(?P<script>\w+\.py)", recorded)
    if old is None:
        return recorded
    (script,) = HERE.rglob(old["script"])
    return command(script) + recorded[old.end() :]


def page(folder: Path) -> str:
    """Return the tables of all result files in a folder and below, each with its command and its machine."""
    parts = []
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text())
        machine = ", ".join(
            f"{key} {value}" for key, value in result["environment"].items() if value is not None
        )
        today = command_of_today(result["command"])
        parts.append(f"## {result['title']}\n\n`{today}`\n\n{table(result['rows'])}\n\n{machine}\n")
    return HEAD + "\n".join(parts)


def main() -> None:
    """Write the page."""
    (FOLDER / "README.md").write_text(page(FOLDER))


if __name__ == "__main__":
    main()
