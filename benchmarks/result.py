"""What every benchmark prints and writes: a table for people, and one JSON object with all its facts."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rd_torch import hardware

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """Return the machine and the versions that a figure belongs to."""
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
    """Return rows as a Markdown table whose numbers are aligned to the right."""
    keys = list(rows[0])
    cells = [keys, *([("" if row[key] is None else str(row[key])) for key in keys] for row in rows)]
    rule = ["---:" if isinstance(rows[0][key], int | float) else "---" for key in keys]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def report_progress(sentence: str) -> None:
    """Tell whoever waits how far a benchmark has come."""
    print(sentence, file=sys.stderr, flush=True)


def command(script: Path, arguments: Sequence[str] = ()) -> str:
    """Return what one types at the root of the repository to run a script.

    Args:
        script: File of the script, somewhere below the root of the repository.
        arguments: What stands behind the name of the script.
    """
    module = ".".join(script.resolve().relative_to(ROOT).with_suffix("").parts)
    return shlex.join(["python", "-m", module, *arguments])


def write_result(title: str, rows: Sequence[Row], machine: dict[str, Any], path: Path | None) -> None:
    """Print a result as a table and as one line of JSON, and write it to a file where one is named.

    Args:
        title: What was measured.
        rows: The table, row by row, all with the same columns.
        machine: The machine and the versions, as `environment` gives them, and further facts.
        path: File to write; None writes no file.
    """
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
