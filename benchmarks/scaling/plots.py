"""The pictures: scores against width and against compute, and what each feature explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.scaling.approaches import OF_MIDDLE, PLAIN_LAST, RIVALS, ROTATED
from benchmarks.scaling.data import TASKS
from benchmarks.scaling.layers import last_layers, level_of
from benchmarks.scaling.maps import ALL, CONCAT, NESTED, PCA, PLAIN, Solver, explained_by_prefix
from benchmarks.scaling.probes import LINEAR, MLP
from benchmarks.scaling.records import Place, Record, costs_of_places, means_of
from rd_torch.plotting import COLOURS, FAINT, GRID, INK, LARGE, SMALL, draw_features, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (NESTED, PCA, ALL, CONCAT)
COLOUR = {PLAIN: INK, ROTATED: FAINT, **dict(zip(KINDS, COLOURS, strict=False))}
MARKER = dict(zip((PLAIN, ROTATED, *KINDS), "oXDsv^", strict=True))
Ends = Mapping[Place, float]


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty picture with a title."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    figure.suptitle(title, fontsize=LARGE, color=INK, fontweight="bold")
    return figure


def draw_scores(records: Sequence[Record], title: str, along: str, ends: Ends) -> Figure:
    """Draw scores: a line for each approach, a column for each task, a row for each head.

    Args:
        records: The scores.
        title: Title of the picture.
        along: What stands on the horizontal axis, in words.
        ends: Where each place stands on it.
    """
    tasks = [task for task in TASKS if any(record.task == task for record in records)]
    figure = new_figure(3.1 * len(tasks), 6.8, title)
    heads = (LINEAR, MLP)
    axes = figure.subplots(len(heads), len(tasks), sharex=True, sharey="col", squeeze=False)
    for row, head in zip(axes, heads, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            chosen = [each for each in records if (each.head, each.task) == (head, task)]
            _draw_lines(ax, chosen, ends)
            sets = len({each.data for each in chosen})
            name = f"{task}, {sets} data set{'s' * (sets > 1)}" if head == LINEAR else ""
            metric = next(iter(chosen[0].scores))
            dress(ax, name, along if ax in axes[-1] else "", f"{metric}, {head} head")
            ax.title.set_fontsize(SMALL + 0.5)
            ax.grid(color=GRID, linewidth=0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = max(2, len(tasks))  # so that narrow pictures hold all names
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL + 1
    )
    return figure


def _draw_lines(ax: Axes, records: Sequence[Record], ends: Ends) -> None:
    """Draw a line for each approach through the means over data sets; chosen layers are drawn solid."""
    from matplotlib.ticker import NullLocator

    means = means_of(records)
    there = dict.fromkeys(record.place for record in records)
    for approach in RIVALS:
        places = [place for place in there if place.approach == approach.name]
        if not places:
            continue
        middle = approach in OF_MIDDLE
        ax.plot(
            [ends[place] for place in places],
            [np.mean([scores[place] for scores in means.values()]) for place in places],
            color=COLOUR[approach.kind],
            marker=MARKER[approach.kind],
            markersize=4.5,
            markerfacecolor=COLOUR[approach.kind] if middle else "white",
            linewidth=1.5,
            linestyle="-" if middle else "--",
            label=approach.name,
        )
    ax.set_xscale("log")
    marked = sorted({ends[place] for place in there if place.approach == PLAIN_LAST})
    widest = max(ends.values())
    marked += [widest] * (widest > 1.5 * marked[-1])  # nearer, the two numbers would run into each other
    ax.set_xticks(marked, [f"{end:,.2g}" if end < 1 else f"{end:,.0f}" for end in marked])
    ax.xaxis.set_minor_locator(NullLocator())


def draw_variance(solver: Solver) -> Figure:
    """Draw the variance that each feature holds, and the share of all raw variance that the first explain."""
    from matplotlib.ticker import PercentFormatter

    last = last_layers(solver.widths)
    columns = solver.columns(last)
    covariance = solver.covariance[columns[:, None], columns]
    figure = new_figure(10, 7, "Explained variance by feature")
    above, below = figure.subplots(2, 1)
    nested = solver.map_of(solver.recipe(NESTED, last)).matrix
    width = nested.shape[1]
    variances = torch.einsum("iw,ij,jw->w", nested, covariance, nested)
    ends = {level_of(layer): solver.widths[layer] for layer in last}
    draw_features(above, ends, (variances / variances.sum()).numpy(), "%", 100)
    dress(above, "Each feature of the nested embedding", "", "share of its variance", above=20)
    for kind in (NESTED, CONCAT, PLAIN, PCA):
        layers = last[-1:] if kind in (PLAIN, PCA) else last
        made = solver.map_of(solver.recipe(kind, layers))
        features = covariance.new_zeros(len(columns), width)
        features[torch.searchsorted(columns, made.columns)] = made.matrix
        explained = explained_by_prefix(features, covariance)
        style = "--" if kind == PLAIN else "-"
        below.plot(explained, style, color=COLOUR[kind], linewidth=1.9, label=f"{kind}, {level_of(last[-1])}")
    for end in list(ends.values())[:-1]:
        below.axvline(end + 0.5, color=FAINT, linewidth=0.8)
    below.set_xlim(0.5, width + 0.5)
    below.set_xticks([1, *ends.values()])
    below.set_ylim(0, 1.02)
    below.yaxis.set_major_formatter(PercentFormatter(1))
    below.legend(frameon=False, fontsize=SMALL, loc="lower right")
    title = "The first features together, of the variance of all backbones' last layers"
    dress(below, title, "feature", "explained linearly")
    return figure


def draw_all(records: Sequence[Record], solver: Solver, largest: int, folder: Path) -> None:
    """Write the three pictures to a folder.

    Args:
        records: The scores of the rivals.
        solver: What solves their maps.
        largest: Number of parameters that run in the largest backbone.
        folder: The folder.
    """
    widths: Ends = {record.place: record.width for record in records}
    costs = {place: cost / largest for place, cost in costs_of_places(records).items()}
    pictures = {
        "scores": draw_scores(records, "Scores against width", "features", widths),
        "compute": draw_scores(
            records,
            "Scores against compute",
            "parameters that run (largest = 1)",
            costs,
        ),
        "variance": draw_variance(solver),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / f"scaling_{name}.png", dpi=150)
