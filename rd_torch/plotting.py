"""Draw a store: its proteins in two dimensions, at two widths, and the size and variance of each feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np

from rd_torch.choices import Scale, check_choice
from rd_torch.disk import require_folder, write_whole
from rd_torch.sampling import Sample, principal_components, read_sample, scale_features
from rd_torch.store import Store, open_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES: Final = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which differ to colour-blind eyes too; yellow is too pale for points.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, FAINT, GRID = "#222222", "#666666", "#E4E4E4"
TINY, SMALL, MEDIUM, LARGE = 6.5, 8.5, 10, 13
"""Font sizes, in points."""

SCALED: Final[Mapping[Scale, str]] = {
    "none": "",
    "feature": "in the maps each feature is divided by its standard deviation",
    "block": "in the maps the features of each level are divided by their root mean variance",
}
"""What the picture says of scaled features."""

UPRIGHT, FLAT = 0.011, 0.0072
"""Shares of the picture's width that a line of upright text, and one letter of flat text, take."""


def plot_store(
    path: str | Path, output: str | Path, *, width: int | None = None, scale: Scale = "none"
) -> None:
    """Draw a store: maps of its proteins, and the norm and variance of each feature.

    The upper row maps the proteins by the first two principal components, of the first `width` features and
    of all features. The lower rows show the root mean square of each feature, and its share of the total
    variance, with the boundaries of the levels. Of more than 5,000 records an evenly spread sample is drawn;
    vectors of residues are averaged by protein.

    Args:
        path: a file or folder that `open_store` reads.
        output: the picture, `.png`, `.pdf` or `.svg`; a file of that name is replaced.
        width: number of features of the narrow map; by default those of the first level.
        scale: what features of the maps are divided by: `"none"`; `"feature"` for each one's standard
            deviation among these proteins, or `"block"` for the root mean variance of what one level adds.

    Raises:
        FileNotFoundError: where there is no store, or no folder for the picture.
        ValueError: for fewer than two records, a width that the store does not have, another suffix, or a
            scale that does not exist.
        ImportError: where matplotlib is not installed.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> _ = rd_torch.embed_to_store(model, [("one", "MQIFVK"), ("two", "MKV")], "proteins.h5")
        >>> rd_torch.plot_store("proteins.h5", "proteins.png", width=48)
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"expected a picture that ends in {', '.join(SUFFIXES)}, got {str(output)!r}")
    check_choice("scale", scale, get_args(Scale))
    require_folder(output)
    require_matplotlib()
    with open_store(path) as store:
        _require_width(store, width)
        sample = read_sample(store)
    figure = draw(sample, width, scale)
    write = partial(figure.savefig, format=output.suffix[1:], dpi=160)
    write_whole(output, write, durable=False)


def require_matplotlib() -> None:
    """Raise an ImportError that says how to install matplotlib, where it is missing."""
    try:
        import matplotlib  # noqa: F401  # to see whether it is there
    except ImportError as error:
        raise ImportError("expected matplotlib, got none: pip install rd_torch[plot]") from error


def _require_width(store: Store, width: int | None) -> None:
    """Raise a ValueError that lists the levels, unless the width is None or at most the store's."""
    if width is not None and not 1 <= width <= store.width:
        levels = zip(store.facts.levels, store.facts.widths, strict=True) if store.facts else ()
        listed = ", ".join(f"{level} {end}" for level, end in levels)
        raise ValueError(
            f"expected a width from 1 to {store.width}{f' (levels: {listed})' if listed else ''}, got {width}"
        )


def draw(sample: Sample, width: int | None = None, scale: Scale = "none") -> Figure:
    """Draw a sample.

    Args:
        sample: the sample.
        width: number of features of the narrow map; by default those of the first level.
        scale: what features of the maps are divided by, as in `plot_store`.

    Returns:
        The picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    narrow = width or min(sample.levels.values(), default=sample.width)
    widths = sorted({narrow, sample.width})
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(10, 10.5), layout=layout, facecolor="white")
    figure.suptitle(sample.title, fontsize=LARGE, color=INK, fontweight="bold")
    notes = [sample.caption, SCALED[scale]]
    figure.supxlabel("; ".join(filter(None, notes)), fontsize=SMALL, color=FAINT)
    columns = [1] * len(widths) + [0.0125 * len(widths)] * sample.has_lengths
    grid = figure.add_gridspec(3, len(columns), height_ratios=(5, 2.3, 2.3), width_ratios=columns)
    axes = [figure.add_subplot(grid[0, column]) for column in range(len(columns))]
    _draw_maps(axes, sample, scale_features(sample, scale), widths)
    _draw_norms(figure.add_subplot(grid[1, :]), sample)
    _draw_shares(figure.add_subplot(grid[2, :]), sample)
    return figure


def _draw_maps(axes: Sequence[Axes], sample: Sample, vectors: np.ndarray, widths: Sequence[int]) -> None:
    """Draw a map of vectors for each width, coloured by the proteins' lengths where they are known.

    The maps have the same orientation. The last axes, which no map takes, show which colour is which length.
    """
    from matplotlib.colors import LogNorm

    style: dict[str, Any] = {"color": COLOURS[0]}
    if sample.has_lengths:
        style = {"c": sample.lengths, "cmap": "viridis", "norm": LogNorm()}
    names = {end: level for level, end in sample.levels.items()}
    before: np.ndarray | None = None
    for ax, width in zip(axes, widths, strict=False):
        points, shares = principal_components(vectors[:, :width])
        if before is not None:  # signs of components are arbitrary: do not mirror what the map before shows
            points *= np.where((points * before).sum(0) < 0, -1, 1)
        before = points
        size = float(np.clip(8_000 / len(points), 5, 34))  # smaller points where there are more of them
        drawn = ax.scatter(
            points[:, 0], points[:, 1], s=size, alpha=0.85, linewidths=0.3, edgecolors="white", **style
        )
        ax.set_aspect("equal", adjustable="datalim")
        ax.margins(0.08)
        which = f"{'all' if width == sample.width else 'the first'} {width:,} features"
        title = f"{names[width]}: {which}" if width in names else which.capitalize()
        labels = [
            f"{nth} principal component, {share:.0%} of variance"
            for nth, share in zip(("first", "second"), shares, strict=True)
        ]
        dress(ax, title, *labels)
        ax.grid(color=GRID, linewidth=0.6)
    if sample.has_lengths:
        _draw_scale(axes[-1], drawn)


def _draw_scale(ax: Axes, drawn: Any) -> None:
    """Draw the scale that says which colour of the maps is which length."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = ax.get_figure()
    assert figure is not None, "axes are part of a figure"
    bar = figure.colorbar(drawn, cax=ax)
    bar.set_label("residues", fontsize=SMALL, color=FAINT)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.minorticks_off()
    ax.tick_params(labelsize=SMALL, colors=FAINT, length=3)
    ax.spines[:].set_visible(False)


def _draw_norms(ax: Axes, sample: Sample) -> None:
    """Draw the root mean square of each feature."""
    norms = np.sqrt(np.square(sample.vectors).mean(0))
    draw_features(ax, _ends_of(sample), norms)
    dress(ax, "Norm of each feature", "", "root mean square", above=20)


def _draw_shares(ax: Axes, sample: Sample) -> None:
    """Draw each feature's share of the total variance, and the sum of the shares up to it."""
    from matplotlib.ticker import PercentFormatter

    variances = sample.vectors.var(0)
    shares = variances / max(variances.sum(), np.finfo(float).tiny)
    draw_features(ax, _ends_of(sample), shares, "%", 100)
    dress(ax, "Explained variance of each feature", "feature", "share of total variance", above=20)
    total = ax.twinx()
    places = np.arange(sample.width + 1) + 0.5
    total.plot(places, np.concatenate([[0], shares.cumsum()]), color=INK, linewidth=1.6)
    total.set_ylim(0, 1.04)
    total.yaxis.set_major_formatter(PercentFormatter(1))
    dress(total, "", "", "cumulative share (line)")
    total.spines["right"].set_visible(True)
    total.spines["left"].set_visible(False)


def _ends_of(sample: Sample) -> Mapping[str, int]:
    """Return the width at which each level ends; without levels, that of one level without a name."""
    return sample.levels or {"": sample.width}


def draw_features(
    ax: Axes, ends: Mapping[str, int], values: np.ndarray, unit: str = "", factor: int = 1
) -> None:
    """Draw a point for each feature in the colour of its level, with boundaries and names of the levels.

    Args:
        ax: the axes to draw on.
        ends: width at which each level's features end, by level.
        values: one value for each feature.
        unit: unit that is written after the numbers of the scale.
        factor: factor by which values are multiplied where they are written.
    """
    starts, width = [0, *ends.values()], len(values)
    size = float(np.clip(3_000 / width, 2, 16))
    for start, end, colour in zip(starts, ends.values(), cycle(COLOURS), strict=False):
        ax.scatter(np.arange(start, end) + 1, values[start:end], s=size, color=colour, linewidths=0)
        ax.axvspan(start + 0.5, end + 0.5, color=colour, alpha=0.07, linewidth=0)
        if start:
            ax.axvline(start + 0.5, color=FAINT, linewidth=0.8)
    _name_levels(ax, ends, starts, width)
    ax.set_xlim(0.5, width + 0.5)
    ax.set_xticks(_keep_apart([1, *ends.values()], 0.0095 * width))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    _scale_by_powers(ax, values[values > 0], unit, factor)


def _name_levels(ax: Axes, ends: Mapping[str, int], starts: Sequence[int], width: int) -> None:
    """Write levels' names above their features; smaller, or else upright, where they do not fit."""
    rooms = [(end - start) / width for start, end in zip(starts, ends.values(), strict=False)]
    fit = all(room > FLAT * len(level) * SMALL / TINY for level, room in zip(ends, rooms, strict=True))
    for level, start, room in zip(ends, starts, rooms, strict=False):
        if room > UPRIGHT:
            ax.text(
                start / width + room / 2,
                1.03,
                level,
                transform=ax.transAxes,
                ha="center",
                rotation=0 if room > FLAT * len(level) else 90,
                color=INK,
                fontsize=SMALL if fit else TINY,
            )


def _scale_by_powers(ax: Axes, values: np.ndarray, unit: str, factor: int) -> None:
    """Set a logarithmic scale with a few plain numbers, if any value is above zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if not len(values):
        return
    ax.set_yscale("log")
    many = values.max() > 500 * values.min()  # then numbers at powers of ten are enough
    ax.yaxis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5), numticks=7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(factor * value) + unit))
    ax.minorticks_off()


def _plain(number: float) -> str:
    """Return a number in digits, without an exponent."""
    return np.format_float_positional(number, precision=3, unique=False, fractional=False, trim="-")


def _keep_apart(places: Sequence[int], digit: float) -> list[int]:
    """Return those of rising places whose numbers do not touch, the last one included."""
    kept: list[int] = []
    for place in reversed(places):
        if not kept or kept[-1] - place >= digit * len(f"{kept[-1]:,}"):
            kept.append(place)
    return kept[::-1]


def dress(ax: Axes, title: str, below: str, beside: str, *, above: float = 6) -> None:
    """Set title and labels, and give all axes the same style.

    Args:
        ax: the axes.
        title: title above the axes.
        below: label of the horizontal axis.
        beside: label of the vertical axis.
        above: distance between title and axes, in points.
    """
    ax.set_title(title, fontsize=MEDIUM, color=INK, loc="left", pad=above)
    ax.set_xlabel(below, fontsize=SMALL, color=FAINT)
    ax.set_ylabel(beside, fontsize=SMALL, color=FAINT)
    ax.tick_params(labelsize=SMALL, colors=FAINT, length=3, which="both")
    for side, spine in ax.spines.items():
        spine.set_color(FAINT)
        spine.set_linewidth(0.8)
        spine.set_visible(side in {"left", "bottom"})
    ax.set_axisbelow(True)
