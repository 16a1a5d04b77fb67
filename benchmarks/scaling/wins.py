"""The win table: on what share of the data sets does one embedding beat another?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from benchmarks.result import Row
from benchmarks.scaling.maps import CONCAT, OLS, PCR, PLAIN, ROTATED, Place, Widths, place_of

DRAWS = 10_000
Means = Mapping[str, Mapping[Place, float]]
"""Scores by data set and place, each the mean over splits of the task's first metric."""

WIDER = {f"wider {name} over narrower": name for name in (PCR, OLS, PLAIN, ROTATED, CONCAT)}
EQUAL = {
    f"{one} over {other}, equal width": (one, other)
    for one, other in (
        (PCR, PLAIN),
        (OLS, PLAIN),
        (PCR, ROTATED),
        (OLS, ROTATED),
        (ROTATED, PLAIN),
        (CONCAT, PCR),
        (CONCAT, OLS),
    )
}


def comparisons(widths: Widths) -> dict[str, dict[str, tuple[Place, Place]]]:
    """Return what is compared: by name and level, the place that might win and the other.

    A wider embedding is compared with that of the level before.
    """
    steps = list(pairwise(widths))
    found = {
        name: {
            wider: (place_of(approach, wider, widths), place_of(approach, narrower, widths))
            for narrower, wider in steps
        }
        for name, approach in WIDER.items()
    }
    for name, (one, other) in EQUAL.items():
        found[name] = {level: (Place(one, level), Place(other, level)) for _, level in steps}
    return found


def wins(differences: np.ndarray) -> np.ndarray:
    """Return 1 where the first is better, 0 where the other is, and a half where they are equal."""
    return (np.sign(differences) + 1) / 2


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean when data sets are drawn again, all steps of one staying together.

    Args:
        values: `(data sets, steps)`.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values.mean(1)[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def win_rows(means: Means, widths: Widths, **about: str) -> list[Row]:
    """Return a row for each comparison: on what share of the data sets, at each level, does the first win?

    Args:
        means: Scores by data set.
        widths: Widths of the backbones by level.
        **about: What else a row says, ahead of the comparison.
    """
    rows = []
    for name, steps in comparisons(widths).items():
        gains = np.array(
            [[means[data][one] - means[data][other] for one, other in steps.values()] for data in means]
        )
        won = wins(gains)
        rows.append(
            {
                **about,
                "comparison": name,
                **{level: f"{share:.2f}" for level, share in zip(steps, won.mean(0), strict=True)},
                "all levels": with_interval(won, "{:.2f}"),
                "mean difference": with_interval(gains, "{:+.4f}"),
            }
        )
    return rows


def with_interval(values: np.ndarray, form: str) -> str:
    """Return the mean of all values and its interval in words."""
    low, high = interval(values)
    return f"{form.format(values.mean())} [{form.format(low)}, {form.format(high)}]"


def win_matrix(means: Means, places: Sequence[Place]) -> np.ndarray:
    """Return the `(places, places)` share of the data sets where the row's place beats the column's."""
    scores = np.array([[each[place] for place in places] for each in means.values()])
    return wins(scores[:, :, None] - scores[:, None, :]).mean(0)
