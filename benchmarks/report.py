"""What every benchmark prints and leaves: a table, a JSON line, a result file; and the page of them all.

    python -m benchmarks.report

writes the tables of `benchmarks/results/` into `benchmarks/README.md`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rd_torch import hardware

HERE = Path(__file__).parent
Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    return {
        "cpu": hardware.cpu_name(),
        "vector units": hardware.cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "fair-esm", "transformers", "safetensors")},
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, numbers to the right."""
    keys = list(rows[0])
    cells = [keys, *([("" if row[key] is None else str(row[key])) for key in keys] for row in rows)]
    rule = ["---:" if isinstance(rows[0][key], int | float) else "---" for key in keys]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def write_result(title: str, rows: Sequence[Row], machine: dict[str, Any], path: Path | None) -> None:
    """Prints the table and one JSON line; writes the result where a path is given."""
    result = {
        "title": title,
        "command": command(Path(sys.argv[0]), sys.argv[1:]),
        "environment": machine,
        "rows": list(rows),
    }
    print(f"{title}\n\n{table(rows)}\n")
    print(json.dumps(result))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def command(script: Path, arguments: Sequence[str] = ()) -> str:
    """What one types at the root of the repository to run a script."""
    module = ".".join(script.resolve().relative_to(HERE.parent).with_suffix("").parts)
    return shlex.join(["python", "-m", module, *arguments])


def command_of_today(recorded: str) -> str:
    """The command of a result; some were made when all scripts lay in one folder and were run as files."""
    old = re.match(r"python benchmarks/(?P<script>\w+\.py)", recorded)
    if old is None:
        return recorded
    (script,) = HERE.rglob(old["script"])
    return command(script) + recorded[old.end() :]


def page(folder: Path) -> str:
    """The tables of all result files, each with its command and machine."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        machine = ", ".join(
            f"{key} {value}" for key, value in result["environment"].items() if value is not None
        )
        today = command_of_today(result["command"])
        parts.append(f"### {result['title']}\n\n`{today}`\n\n{table(result['rows'])}\n\n{machine}\n")
    return "\n".join(parts)


def main() -> None:
    readme = HERE / "README.md"
    head, rest = readme.read_text().split("<!-- results -->", 1)
    tail = rest.split("<!-- end of results -->", 1)[1]
    readme.write_text(f"{head}<!-- results -->\n\n{page(HERE / 'results')}\n<!-- end of results -->{tail}")


if __name__ == "__main__":
    main()
