"""Single scores, and their means and differences with intervals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Place(NamedTuple):
    """An approach at a level, or at a layer where each stands alone."""

    approach: str
    level: str


Means = Mapping[str, Mapping[Place, float]]
"""Scores by data set and place, each the mean over splits of the task's first metric."""


@dataclass(frozen=True)
class Record:
    """One score.

    Attributes:
        fit: What sequences the maps were fitted on, in words.
        approach: How the embedding was made.
        level: Level of the family, or layer.
        width: Number of features.
        cost: Number of parameters that run for each token.
        layers: Layers that the embedding was made of.
        data: Name of the data set.
        task: What the data set asks.
        head: What predicts.
        split: Number of the data set's split, from 0.
        scores: Scores by metric; the task's first metric stands first.
    """

    fit: str
    approach: str
    level: str
    width: int
    cost: int
    layers: tuple[str, ...]
    data: str
    task: str
    head: str
    split: int
    scores: dict[str, float]

    @property
    def place(self) -> Place:
        """Return approach and level."""
        return Place(self.approach, self.level)

    @property
    def first(self) -> float:
        """Return the score in the task's first metric."""
        return next(iter(self.scores.values()))


def means_of(records: Iterable[Record]) -> Means:
    """Return the mean over splits by data set and place."""
    found: dict[str, dict[Place, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record.data][record.place].append(record.first)
    return {
        data: {place: statistics.mean(scores) for place, scores in places.items()}
        for data, places in found.items()
    }


def costs_of_places(records: Iterable[Record]) -> dict[Place, float]:
    """Return the mean number of parameters that run, by place, each data set counted alike."""
    found: dict[Place, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record.place][record.data].append(record.cost)
    return {place: statistics.mean(map(statistics.mean, by_set.values())) for place, by_set in found.items()}


def column(means: Means, place: Place) -> np.ndarray:
    """Return the `(data sets, 1)` scores of a place."""
    return np.array([[of_set[place]] for of_set in means.values()])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean when data sets are drawn again, all steps of one staying together.

    Args:
        values: `(data sets, steps)`.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values.mean(1)[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def with_interval(values: np.ndarray, form: str = "{:+.4f}") -> str:
    """Return the mean of all values and its interval in words."""
    low, high = interval(values)
    return f"{form.format(values.mean())} [{form.format(low)}, {form.format(high)}]"
