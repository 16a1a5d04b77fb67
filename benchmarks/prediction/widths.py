"""Which width predicts what, and what is it worth on labels that nothing has seen?

    python -m benchmarks.prediction.widths --picture FILE.png --output FILE

`rd_torch.learn` does what it does for users, with its defaults, on these data sets:

- Melting temperature, with the test set that it is published with; similar proteins lie in one fold.
- Five assays of mutations. All variants of a protein are similar, so folds are drawn at random.
- Three-state secondary structure of residues; similar proteins lie in one fold.

Scores are cross-validated: no label of a fold has a part in what is predicted there, not even by the choice
of a penalty. Intervals are 95 % of a bootstrap over groups of similar sequences, or over variants. "chosen"
marks the narrowest width that is at most one standard error worse than the best; "whole" is the score of the
whole procedure, with that choice. Beside it stands the time of all embeddings, and of learning.
"""

from __future__ import annotations

import csv
import gzip
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

import rd_torch
from benchmarks.options import add_data_option, add_model_option, data_folder, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.scaling.data import data_assays
from rd_torch.learning import Findings
from rd_torch.plotting import COLOURS, FAINT, GRID, SMALL, dress

LONGEST = 1_022
"""Number of residues of a protein at the most; longer ones are left out."""

STRUCTURES = 500
"""Number of proteins that teach secondary structure."""


class Task(NamedTuple):
    """A table, and how it is learnt."""

    name: str
    table: dict[str, list[Any]]
    options: dict[str, Any]


def tasks(data: Path, variants: int) -> Iterator[Task]:
    """Yield every data set.

    Args:
        data: Folder of the protein data.
        variants: Number of variants of an assay at the most.
    """
    with gzip.open(data / "sequence" / "meltome.csv.gz", "rt") as handle:
        rows = [row for row in csv.DictReader(handle) if len(row["sequence"]) <= LONGEST]
    melting: dict[str, list[Any]] = {
        "sequence": [row["sequence"] for row in rows],
        "y": [float(row["tm_mean"]) for row in rows],
        "set": [row["set"] for row in rows],
    }
    yield Task("melting temperature", melting, {"split_column": "set"})
    for name, found in data_assays(data):
        chosen = random.Random(0).sample(found, min(variants, len(found)))
        table: dict[str, list[Any]] = {
            "sequence": [each[1] for each in chosen],
            "y": [each[2] for each in chosen],
        }
        yield Task(name, table, {})
    with gzip.open(data / "residue" / "ss3_train.csv.gz", "rt") as handle:
        rows = [row for row in csv.DictReader(handle) if len(row["sequence"]) <= LONGEST]
    rows = random.Random(0).sample(rows, min(STRUCTURES, len(rows)))
    states: dict[str, list[Any]] = {
        "sequence": [row["sequence"] for row in rows],
        "y": [row["label"] for row in rows],
    }
    yield Task("secondary structure", states, {"per_residue": True})


def rows_of(name: str, findings: Findings, seconds: float) -> list[Row]:
    """Return the rows of a data set: one for each width, and one for the whole procedure."""
    common: Row = {"data": name, "score": findings.score_name}
    found = [
        common
        | {
            "width": f"{row.width} ({row.level})",
            "value": f"{row.score:.3f}",
            "from": f"{row.low:.3f}",
            "to": f"{row.high:.3f}",
            "Spearman": None,
            "test set": None if row.test is None else f"{row.test:.3f}",
            "chosen": "yes" if row.width == findings.width else None,
            "seconds": None,
        }
        for row in findings.widths
    ]
    ends = {"value": f"{findings.score:.3f}", "from": f"{findings.low:.3f}", "to": f"{findings.high:.3f}"}
    ranks = None if findings.spearman is None else f"{findings.spearman:.3f}"
    whole = {
        "width": "whole",
        **ends,
        "Spearman": ranks,
        "test set": None,
        "chosen": None,
        "seconds": f"{seconds:.0f}",
    }
    return [*found, common | whole]


def draw(found: dict[str, Findings], path: Path) -> None:
    """Write a picture with a panel for each data set: the score at every width, the chosen one filled."""
    figure = Figure(figsize=(10, 5.2), layout="constrained", facecolor="white")
    axes = list(figure.subplots(2, (len(found) + 1) // 2, squeeze=False).flat)
    for ax, (name, findings) in zip(axes, found.items(), strict=False):
        rows, places = findings.widths, list(range(len(findings.widths)))
        scores = [row.score for row in rows]
        bars = [[row.score - row.low for row in rows], [row.high - row.score for row in rows]]
        ax.errorbar(places, scores, yerr=bars, color=COLOURS[0], capsize=3, linewidth=1.4)
        fills = [COLOURS[0] if row.width == findings.width else "white" for row in rows]
        ax.scatter(places, scores, c=fills, edgecolors=COLOURS[0], zorder=3, s=32)
        if rows[0].test is not None:
            tests = [row.test for row in rows if row.test is not None]
            ax.plot(places, tests, color=COLOURS[1], marker="s", markersize=4, linewidth=1.2)
        ax.set_xticks(places, [str(row.width) for row in rows])
        ax.margins(x=0.12)
        ax.grid(axis="y", color=GRID, linewidth=0.6)
        short = name.replace("_", " ").split(" Ranganathan")[0]
        dress(ax, short[:28], "", findings.score_name)
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    note = "features; filled: the width that is chosen; squares: the test set; bars: 95 % intervals"
    figure.supxlabel(note, fontsize=SMALL, color=FAINT)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Learn every data set."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--variants",
        type=int,
        default=3_000,
        help="Number of variants of an assay at the most, by default %(default)s.",
    )
    parser.add_argument("--only", help="Beginning of the names of the data sets to take; by default all.")
    parser.add_argument("--picture", type=Path, help="Picture to write.")
    arguments = parser.parse_args()
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    found: dict[str, Findings] = {}
    rows: list[Row] = []
    for name, table, options in tasks(data_folder(arguments), arguments.variants):
        if not name.startswith(arguments.only or ""):
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that variants are similar is what is asked for
            found[name] = rd_torch.learn(table, "y", model=model, **options).findings
        rows += rows_of(name, found[name], time.perf_counter() - start)
        report_progress(f"{name}: {found[name].split}; {time.perf_counter() - start:.0f} s")
    if arguments.picture:
        draw(found, arguments.picture)
    title = f"What each width predicts, {arguments.model}"
    write_result(
        title,
        rows,
        environment() | {"splits": "; ".join(dict.fromkeys(each.split for each in found.values()))},
        arguments.output,
    )


if __name__ == "__main__":
    main()
