"""The picture of a predictor: its score at every width."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rd_torch.disk import write_whole
from rd_torch.learning.findings import Findings
from rd_torch.plotting import COLOURS, FAINT, GRID, INK, LARGE, SMALL, dress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_widths(findings: Findings, path: Path) -> None:
    """Write the picture of the score at every width, with intervals.

    Args:
        findings: what was found.
        path: the picture, whose suffix names its format.
    """
    figure = _draw(findings)
    write_whole(path, partial(figure.savefig, format=path.suffix[1:], dpi=160), durable=False)


def _draw(findings: Findings) -> Figure:
    """Draw the score against the width, each width under the name of its level."""
    from matplotlib.figure import Figure

    rows, places = findings.widths, list(range(len(findings.widths)))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    below = [row.score - row.low for row in rows]
    above = [row.high - row.score for row in rows]
    ax.errorbar(
        places,
        [row.score for row in rows],
        yerr=[below, above],
        color=COLOURS[0],
        marker="o",
        markersize=5,
        capsize=3,
        linewidth=1.4,
        label="cross-validation, 95 % interval",
    )
    if rows[0].test is not None:
        tests = [row.test for row in rows if row.test is not None]
        ax.plot(places, tests, color=COLOURS[1], marker="s", markersize=5, linewidth=1.4, label="test set")
    chosen = rows.index(findings.chosen)
    ax.axvline(chosen, color=INK, linewidth=1, linestyle=":", label="chosen")
    ax.set_xticks(places, [f"{row.width:,}\n{row.level}" for row in rows])
    ax.margins(x=0.08)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    dress(ax, "", "number of features, and the largest backbone that runs", findings.score_name)
    ax.legend(fontsize=SMALL, frameon=False, labelcolor=FAINT)
    figure.suptitle(
        f"{findings.target}: what each width predicts", fontsize=LARGE, color=INK, fontweight="bold"
    )
    return figure
