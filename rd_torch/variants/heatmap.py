"""Draw the scores of single substitutions as papers show them: positions by amino acids, a map a level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from rd_torch.disk import require_folder, write_whole
from rd_torch.plotting import FAINT, INK, LARGE, SMALL, SUFFIXES, TINY, dress, require_matplotlib
from rd_torch.variants.variant import Variant, read_variants, read_wild_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORDER: Final = "GAVLIMCPFYWHKRDENQST"
"""The amino acids from top to bottom: small and aliphatic, aromatic, charged, polar."""

POSITIONS_IN_A_ROW: Final = 80
"""Number of positions that stand side by side at the most; longer proteins go on in rows of equal length."""

SHARE_SHOWN: Final = 98
"""Percentile of the absolute scores at which colours are at their strongest."""

MOST_PIXELS: Final = 60_000
"""Height of a picture at the most; matplotlib draws none that is higher than 65,535 pixels."""

MISSING: Final = "#D9D9D9"


class Landscape(NamedTuple):
    """The scores of single substitutions.

    Attributes:
        wild_type: residues of the wild type.
        first: number of its first residue.
        levels: names of the levels.
        scores: `(levels, residues, 20)` scores in the order of `ORDER`; NaN where there is none.
    """

    wild_type: str
    first: int
    levels: Sequence[str]
    scores: np.ndarray

    @classmethod
    def empty(cls, wild_type: str, first: int, levels: Sequence[str]) -> Self:
        """Make a landscape without scores."""
        shape = (len(levels), len(wild_type), len(ORDER))
        return cls(wild_type, first, list(levels), np.full(shape, np.nan, dtype=np.float32))

    def note(self, variant: Variant, scores: np.ndarray) -> None:
        """Take over the scores of a variant, `(levels,)` numbers, if it is a single substitution."""
        if len(variant.substitutions) == 1 and variant.substitutions[0].mutant in ORDER:
            ((site, _, mutant),) = variant.substitutions
            self.scores[:, site, ORDER.index(mutant)] = scores

    @property
    def span(self) -> tuple[int, int]:
        """Index of the first site that has a score, and of the site after the last.

        Raises:
            ValueError: where there is none.
        """
        (sites,) = np.nonzero(np.isfinite(self.scores).any((0, 2)))
        if not len(sites):
            raise ValueError("expected at least one single substitution for a heat map, got none")
        return int(sites[0]), int(sites[-1]) + 1


def plot_variants(
    wild_type: str,
    variants: Iterable[str | Variant],
    scores: Mapping[str, Sequence[float] | np.ndarray],
    output: str | Path,
    *,
    first: int = 1,
    title: str = "",
) -> None:
    """Draw a heat map of the single substitutions among variants, a map for each level.

    Blue is likelier than the wild type, red is less likely, and a dot marks the letter of the wild type. Grey
    cells have no score. The positions run from the first to the last that has a score; more than 80 go on in
    the next row.

    Args:
        wild_type: sequence of the wild type.
        variants: the variants; those of several substitutions are not drawn.
        scores: `(variants,)` scores by level, as `score_variants` returns them.
        output: the picture, `.png`, `.pdf` or `.svg`; a file of that name is replaced.
        first: number of the wild type's first residue.
        title: title of the picture.

    Raises:
        FileNotFoundError: where there is no folder for the picture.
        ValueError: for no single substitution, another number of scores than of variants, and another suffix.
        ImportError: where matplotlib is not installed.

    Examples:
        >>> model, wild = rd_torch.RDModel.from_pretrained("esm2-rd-mini"), "MQIFVKTLTG"
        >>> variants = list(rd_torch.variants.all_single(wild))
        >>> scores = rd_torch.score_variants(model, wild, variants, levels=["28K", "1M"])
        >>> rd_torch.plot_variants(wild, variants, scores, "map.png")
    """
    output = Path(output)
    require_picture(output)
    residues = read_wild_type(wild_type)
    read = read_variants(variants, residues, first)
    for level, numbers in scores.items():
        if len(numbers) != len(read):
            raise ValueError(f"expected {len(read):,} scores of level {level}, got {len(numbers):,}")
    landscape = Landscape.empty(residues, first, list(scores))
    for place, variant in enumerate(read):
        landscape.note(variant, np.array([numbers[place] for numbers in scores.values()]))
    plot_landscapes(landscape, output, title)


def require_picture(output: Path) -> None:
    """Require that a heat map can be written.

    Args:
        output: the picture.

    Raises:
        FileNotFoundError: where there is no folder for it.
        ValueError: for another suffix than that of a picture.
        ImportError: where matplotlib is not installed.
    """
    if output.suffix not in SUFFIXES:
        raise ValueError(f"expected a picture that ends in {', '.join(SUFFIXES)}, got {str(output)!r}")
    require_folder(output)
    require_matplotlib()


def plot_landscapes(landscape: Landscape, output: Path, title: str = "") -> None:
    """Draw a landscape to a file; see `plot_variants`."""
    from matplotlib.figure import Figure

    start, stop = landscape.span
    longest = ceil((stop - start) / ceil((stop - start) / POSITIONS_IN_A_ROW))
    pieces = [(begin, min(begin + longest, stop)) for begin in range(start, stop, longest)]
    rows = len(pieces) * len(landscape.levels)
    figure = Figure(figsize=(1.6 + 0.15 * max(longest, 24), 1.0 + 3.3 * rows), facecolor="white")
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=LARGE, color=INK, fontweight="bold")
    grid = figure.add_gridspec(rows, 1)
    limit = float(np.nanpercentile(np.abs(landscape.scores), SHARE_SHOWN)) or 1.0
    axes = [figure.add_subplot(grid[number, 0]) for number in range(rows)]
    for number, ax in enumerate(axes):
        piece, level = divmod(number, len(landscape.levels))
        drawn = _draw(ax, landscape, level, pieces[piece], longest, limit)
    bar = figure.colorbar(
        drawn, ax=axes, shrink=0.9 / rows, anchor=(0, 1), aspect=18, pad=0.01, extend="both"
    )
    bar.set_label("score: log odds against the wild type, nats", fontsize=SMALL, color=FAINT)
    bar.ax.tick_params(labelsize=SMALL, colors=FAINT, length=3)
    dpi = min(130, MOST_PIXELS / figure.get_figheight())
    write_whole(output, partial(figure.savefig, format=output.suffix[1:], dpi=dpi), durable=False)


def _draw(
    ax: Axes, landscape: Landscape, level: int, piece: tuple[int, int], longest: int, limit: float
) -> Any:
    """Draw a level's map of some positions."""
    from matplotlib import colormaps

    start, stop = piece
    colours = colormaps["RdBu"].with_extremes(bad=MISSING)
    values = landscape.scores[level, start:stop].T.copy()
    letters = landscape.wild_type[start:stop]
    known = [(place, ORDER.index(letter)) for place, letter in enumerate(letters) if letter in ORDER]
    for place, row in known:
        values[row, place] = 0  # the wild type against itself
    drawn = ax.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="equal", interpolation="nearest")
    ax.scatter([place for place, _ in known], [row for _, row in known], s=5, color=INK, linewidths=0)
    numbers = range(start + landscape.first, stop + landscape.first)
    marked = [
        place
        for place, number in enumerate(numbers)
        if number % 10 == 0 or (place == 0 and number % 10 < 8)  # 9 would touch 10
    ]
    dress(ax, f"{landscape.levels[level]}: positions {numbers[0]} to {numbers[-1]}", "", "")
    ax.set_xticks(range(len(letters)), letters, fontsize=TINY)
    ax.set_yticks(range(len(ORDER)), ORDER, fontsize=TINY)
    ax.set_xlim(-0.5, longest - 0.5)
    above = ax.secondary_xaxis("top")
    above.set_xticks(marked, [str(numbers[place]) for place in marked], fontsize=TINY)
    above.tick_params(colors=FAINT, length=2)
    above.spines[:].set_visible(False)
    ax.spines[:].set_visible(False)
    return drawn
