"""The table and the picture of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.finetuning.problem import Example, Problem
from benchmarks.finetuning.run import APPROACHES, BASELINE, Key, Progress
from benchmarks.result import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[Key, Progress]
Widths = Mapping[str, int]
COLOURS = dict(zip(APPROACHES, ("0.55", "tab:blue", "tab:orange", "tab:green"), strict=True))


def constant_row(problem: Problem, sets: Mapping[str, Sequence[Example]]) -> Row:
    """Return the row of somebody who looks at no protein."""
    name, scores = problem.constant(sets["train"], sets["test"])
    shown = {metric: f"{scores[metric]:.4f}" if metric in scores else "" for metric in problem.metrics}
    return {"approach": name, "level": "", "width": None, "trained parameters": 0, "epochs": None, **shown}


def rows_of(problem: Problem, widths: Widths, runs: Runs) -> list[Row]:
    """Return a row for each approach and level: means over the seeds, and their spread.

    Args:
        problem: What was asked.
        widths: Width of the embedding at each level.
        runs: All runs.
    """
    rows = []
    for approach, level in dict.fromkeys(key[:2] for key in runs):
        mine = [run for key, run in runs.items() if key[:2] == (approach, level)]
        row: Row = {
            "approach": level if approach == BASELINE else approach,
            "level": "" if approach == BASELINE else level,
            "width": widths.get(level, problem.baseline[1]),
            "trained parameters": mine[0].parameters,
            "epochs": round(statistics.mean(run.best_epoch for run in mine), 1),
        }
        for metric in problem.metrics:
            scores = [run.test[metric] for run in mine if run.test]
            spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            row[metric] = f"{statistics.mean(scores):.4f}{spread}"
        rows.append(row)
    return rows


def draw(problem: Problem, widths: Widths, runs: Runs, path: Path) -> None:
    """Draw validation scores by epoch, a panel for each level and a colour for each approach.

    Args:
        problem: What was asked.
        widths: Width of the embedding at each level.
        runs: All runs.
        path: File of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(widths) + 0.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(widths), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (level, width) in zip(axes, widths.items(), strict=True):
        for key, run in runs.items():
            if key.level in (level, problem.baseline[0]):
                draw_curve(axis, key, run)
        axis.set_title(f"{level}, width {width}", fontsize=10)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("epoch")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{problem.metrics[0]}, validation")
    axes[-1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_curve(axis: Axes, key: Key, run: Progress) -> None:
    """Draw the learning curve of one run, and a dot at its best epoch."""
    colour = COLOURS[key.approach]
    name = key.level if key.approach == BASELINE else key.approach
    epochs = range(1, len(run.curve) + 1)
    axis.plot(epochs, run.curve, color=colour, alpha=0.8, lw=1.3, label=name if key.seed == 0 else None)
    axis.plot(run.best_epoch, max(run.curve), "o", color=colour, ms=4)
