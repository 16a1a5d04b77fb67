"""The picture of recall over what a query is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.result import Row
from rd_torch.plotting import COLOURS, GRID, INK, SMALL, dress


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw recall@10 of the largest index, with a panel for each first stage.

    Args:
        rows: The rows of `benchmarks.search.recall`.
        path: Picture to write.
    """
    size = max(row["proteins"] for row in rows)
    rows = [row for row in rows if row["proteins"] == size]
    whole = max(row["features"] for row in rows)
    stages = list(dict.fromkeys(row["first stage"] for row in rows))
    figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for ax, stage in zip(panels, stages, strict=True):
        draw_panel(ax, [row for row in rows if row["first stage"] == stage and row["features"] < whole])
        exact = [row[key] for row in rows if row["features"] == whole for key in ("MiB a query", "recall@10")]
        ax.scatter(*exact, marker="*", s=90, color=INK, label="all features")
        ends = {row["MiB a query"]: row["features"] for row in rows if row["candidates"] is None}
        ax.set_xticks(list(ends), [f"{each:.3g}\n({width})" for each, width in ends.items()])
        ax.minorticks_off()
        dress(ax, f"By {stage}", "", "recall@10" if ax is panels[0] else "")
    panels[0].legend(fontsize=SMALL, frameon=False, loc="lower right")
    figure.suptitle(f"What is found of the 10 nearest of {size:,} proteins", fontsize=SMALL + 3, color=INK)
    figure.supxlabel(
        "MiB that a query is compared with, on a logarithmic scale; in brackets, features of the first stage",
        fontsize=SMALL,
        color=INK,
    )
    figure.savefig(path, dpi=110)


def draw_panel(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw the lines of one first stage, each over its numbers of features.

    Args:
        ax: The axes.
        rows: The rows of that stage.
    """
    counts = list(dict.fromkeys(row["candidates"] for row in rows))
    for count, colour in zip(counts, (INK, *COLOURS), strict=False):
        cut = [row for row in rows if row["candidates"] == count]
        sizes, recalls = ([row[key] for row in cut] for key in ("MiB a query", "recall@10"))
        label = "first stage alone" if count is None else f"{count:,} candidates"
        ax.plot(sizes, recalls, marker="o", markersize=5, linewidth=1.5, color=colour, label=label)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.04)
    ax.grid(color=GRID, linewidth=0.6)
