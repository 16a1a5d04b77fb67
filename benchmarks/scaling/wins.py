"""The win table: on what share of the data sets does one embedding beat another?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np

from benchmarks.result import Row
from benchmarks.scaling.approaches import (
    ALL_LAST,
    CONCAT_LAST,
    NESTED_CHOSEN,
    NESTED_LAST,
    PCA_LAST,
    PLAIN_BEST,
    PLAIN_LAST,
    PLAIN_ROTATED,
)
from benchmarks.scaling.data import MUTATIONS, TASKS
from benchmarks.scaling.probes import LINEAR, MLP
from benchmarks.scaling.records import Means, Place, Record, means_of, with_interval

LEAST_SETS = 5
"""Number of data sets below which a group of them has no row in the win table."""

WIDER = (PLAIN_LAST, PLAIN_BEST, NESTED_LAST, NESTED_CHOSEN, ALL_LAST, PCA_LAST, CONCAT_LAST)
EQUAL = (
    (NESTED_LAST, PLAIN_LAST),
    (NESTED_LAST, PLAIN_ROTATED),
    (NESTED_CHOSEN, PLAIN_BEST),
    (NESTED_CHOSEN, NESTED_LAST),
    (NESTED_LAST, PCA_LAST),
    (NESTED_CHOSEN, PCA_LAST),
    (CONCAT_LAST, NESTED_LAST),
    (ALL_LAST, PLAIN_LAST),
)
Comparisons = dict[str, dict[str, tuple[Place, Place]]]
"""The place that might win and the other, by name of the comparison and level."""


def comparisons(levels: Sequence[str]) -> Comparisons:
    """Return what is compared.

    A wider embedding is compared with that of the level before, and approaches at each level but the first.
    """
    found: Comparisons = {
        f"wider over narrower: {name}": {
            wider: (Place(name, wider), Place(name, narrower)) for narrower, wider in pairwise(levels)
        }
        for name in WIDER
    }
    for one, other in EQUAL:
        found[f"{one} over {other}"] = {
            level: (Place(one, level), Place(other, level)) for level in levels[1:]
        }
    return found


def wins(differences: np.ndarray) -> np.ndarray:
    """Return 1 where the first is better, 0 where the other is, and a half where they are equal."""
    return (np.sign(differences) + 1) / 2


def win_rows(means: Means, levels: Sequence[str], **about: str) -> list[Row]:
    """Return a row for each comparison: on what share of the data sets, at each level, does the first win?

    Comparisons of places without scores are left out.

    Args:
        means: Scores by data set.
        levels: Levels of the family, smallest first.
        **about: What else a row says, ahead of the comparison.
    """
    rows = []
    for name, steps in comparisons(levels).items():
        if any(place not in of_set for of_set in means.values() for pair in steps.values() for place in pair):
            continue
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
                "mean difference": with_interval(gains),
            }
        )
    return rows


def all_win_rows(records: Sequence[Record], levels: Sequence[str]) -> list[Row]:
    """Return the win table of each head: on the data sets of each task, on those of mutations, and on all.

    Groups of fewer than `LEAST_SETS` are left out, for shares of them say next to nothing.
    """
    rows = []
    groups = {**{task: (task,) for task in TASKS}, "mutations": tuple(MUTATIONS.values()), "all": TASKS}
    for head, (name, tasks) in product((LINEAR, MLP), groups.items()):
        means = means_of(each for each in records if each.head == head and each.task in tasks)
        if len(means) >= LEAST_SETS or tasks == TASKS:
            rows += win_rows(means, levels, head=head, **{"data sets": f"{name}, {len(means)}"})
    return rows
