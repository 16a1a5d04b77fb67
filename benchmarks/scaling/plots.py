"""The pictures: scores against width, who beats whom, what each feature explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.scaling.data import TASKS
from benchmarks.scaling.maps import (
    APPROACHES,
    CONCAT,
    OLS,
    PCR,
    PLAIN,
    ROTATED,
    Affine,
    Place,
    explained_by_prefix,
    place_of,
    places,
)
from benchmarks.scaling.probes import HEADS, LINEAR
from benchmarks.scaling.tables import Record, means_of
from benchmarks.scaling.wins import win_matrix
from rd_torch import RunningMoments
from rd_torch.plotting import COLOURS, FAINT, GRID, INK, LARGE, SMALL, draw_features, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR = dict(zip(APPROACHES, (FAINT, INK, *COLOURS), strict=False))
MARKER = dict(zip(APPROACHES, "oXsDv^", strict=True))
LINE = {PLAIN: "--", ROTATED: "-.", OLS: ":"}
"""Styles of the lines that are not solid: least squares often lies on principal component regression."""


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty picture with a title."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    figure.suptitle(title, fontsize=LARGE, color=INK, fontweight="bold")
    return figure


def draw_scores(records: Sequence[Record], widths: Mapping[str, int]) -> Figure:
    """Draw scores against width: a line for each approach, a column for each task, a row for each head."""
    tasks = [task for task in TASKS if any(record.task == task for record in records)]
    figure = new_figure(3.1 * len(tasks), 6.6, "Scores against width")
    axes = figure.subplots(len(HEADS), len(tasks), sharex=True, sharey="col", squeeze=False)
    for row, head in zip(axes, HEADS, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            chosen = [each for each in records if (each.head, each.task) == (head, task)]
            _draw_lines(ax, chosen, widths)
            sets = len({each.data for each in chosen})
            title = f"{task}, {sets} data set{'s' * (sets > 1)}" if head == next(iter(HEADS)) else ""
            metric = next(iter(chosen[0].scores))
            dress(ax, title, "features" if ax in axes[-1] else "", f"{metric}, {head} head")
            ax.title.set_fontsize(SMALL + 0.5)
            ax.grid(color=GRID, linewidth=0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=SMALL + 1
    )
    return figure


def _draw_lines(ax: Axes, records: Sequence[Record], widths: Mapping[str, int]) -> None:
    """Draw a line for each approach, from the first level on, through the means over data sets."""
    from matplotlib.ticker import NullLocator

    means = means_of(records)
    ends = {record.place: record.width for record in records}
    for approach in APPROACHES:
        along = [place_of(approach, level, widths) for level in widths]
        ax.plot(
            [ends[place] for place in along],
            [np.mean([scores[place] for scores in means.values()]) for place in along],
            color=COLOUR[approach],
            marker=MARKER[approach],
            markersize=4.5,
            linewidth=1.5,
            linestyle=LINE.get(approach, "-"),
            label=approach,
        )
    ax.set_xscale("log")
    marked = sorted({*widths.values(), max(ends.values())})
    ax.set_xticks(marked, [f"{width:,}" for width in marked])
    ax.xaxis.set_minor_locator(NullLocator())


def draw_wins(records: Sequence[Record], widths: Mapping[str, int]) -> Figure:
    """Draw who beats whom with the linear head: a cell for each pair of embeddings."""
    shown = places(widths)
    means = means_of(record for record in records if record.head == LINEAR)
    shares = win_matrix(means, shown)
    size = 2.6 + 0.52 * len(shown)
    figure = new_figure(
        size + 0.8, size, f"Share of the {len(means)} data sets where the row beats the column, linear head"
    )
    ax = figure.subplots()
    blank = np.where(np.eye(len(shown), dtype=bool), np.nan, shares)
    drawn = ax.imshow(blank, cmap="RdBu", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(blank):
        if not np.isnan(share):
            strong = abs(share - 0.5) > 0.3
            ax.text(
                column, row, f"{share:.2f}".removeprefix("0"), ha="center", va="center",
                fontsize=SMALL - 0.5, color="white" if strong else INK,
            )  # fmt: skip
    names = [f"{place.approach}, {place.level}" for place in shown]
    names[0] = f"{shown[0].level}, plain or nested"
    ax.set_xticks(range(len(shown)), names, rotation=90)
    ax.set_yticks(range(len(shown)), names)
    groups = [place.approach for place in shown]
    for start in (k for k in range(1, len(groups)) if k == 1 or groups[k] != groups[k - 1]):
        ax.axhline(start - 0.5, color="white", linewidth=3)
        ax.axvline(start - 0.5, color="white", linewidth=3)
    dress(ax, "", "", "")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = figure.colorbar(drawn, ax=ax, shrink=0.5, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, colors=FAINT, length=3)
    return figure


def draw_variance(maps: Mapping[Place, Affine], moments: RunningMoments, widths: Mapping[str, int]) -> Figure:
    """Draw the variance that each feature holds, and the share of all raw variance that the first explain."""
    from matplotlib.ticker import PercentFormatter

    *_, last = widths
    covariance = moments.covariance()
    figure = new_figure(10, 7, "Explained variance by feature")
    above, below = figure.subplots(2, 1)
    nested = maps[Place(PCR, last)].matrix
    width = nested.shape[1]
    variances = torch.einsum("iw,ij,jw->w", nested, covariance, nested)
    levels = {level: end for level, end in widths.items() if end <= width}
    draw_features(above, levels, (variances / variances.sum()).numpy(), "%", 100)
    dress(above, f"Each feature of the nested embedding ({PCR})", "", "share of its variance", above=20)
    for approach in (PCR, OLS, CONCAT, PLAIN, ROTATED):
        explained = explained_by_prefix(maps[Place(approach, last)].matrix, covariance)
        style = LINE.get(approach, "-")
        below.plot(explained, style, color=COLOUR[approach], linewidth=1.9, label=f"{approach}, {last}")
    for end in list(levels.values())[:-1]:
        below.axvline(end + 0.5, color=FAINT, linewidth=0.8)
    below.set_xlim(0.5, width + 0.5)
    below.set_xticks([1, *levels.values()])
    below.set_ylim(0, 1.02)
    below.yaxis.set_major_formatter(PercentFormatter(1))
    below.legend(frameon=False, fontsize=SMALL, loc="lower right")
    title = "The first features together, of the variance of all backbones' embeddings"
    dress(below, title, "feature", "explained linearly")
    return figure


def draw_all(
    records: Sequence[Record],
    maps: Mapping[Place, Affine],
    moments: RunningMoments,
    widths: Mapping[str, int],
    folder: Path,
) -> None:
    """Write the three pictures to a folder."""
    pictures = {
        "scores": draw_scores(records, widths),
        "wins": draw_wins(records, widths),
        "variance": draw_variance(maps, moments, widths),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / f"scaling_{name}.png", dpi=150)
