"""The tables: scores, wins, and stability."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from benchmarks.result import Row
from benchmarks.scaling.data import MUTATIONS, TASKS
from benchmarks.scaling.maps import ALL, APPROACHES, Place, angles_at_random, angles_between, place_of
from benchmarks.scaling.probes import HEADS
from benchmarks.scaling.wins import Means, win_rows

LEAST_SETS = 5
"""Number of data sets below which a group of them has no row in the win table."""


@dataclass(frozen=True)
class Record:
    """One score.

    Attributes:
        fit: What sequences the maps were fitted on, in words.
        approach: How the embedding was made.
        level: Level of the family.
        width: Number of features.
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


def score_rows(records: Sequence[Record], widths: Mapping[str, int]) -> list[Row]:
    """Return a row for each head, task, metric and approach: at each level the mean over sets and splits."""
    found: dict[tuple[str, str, str, Place], list[float]] = defaultdict(list)
    sets: dict[str, set[str]] = defaultdict(set)
    for record in records:
        sets[record.task].add(record.data)
        for metric in ("Spearman", "accuracy", "macro AUPR"):
            if metric in record.scores:
                found[record.head, record.task, metric, record.place].append(record.scores[metric])
    ends = {(record.approach, record.level): record.width for record in records}
    rows = []
    for head, task, metric in dict.fromkeys(key[:3] for key in found):
        for approach in APPROACHES:
            places = [place_of(approach, level, widths) for level in widths]
            wide = f" ({', '.join(str(ends[place]) for place in places)} features)" if approach == ALL else ""
            row = {"head": head, "task": task, "data sets": len(sets[task]), "metric": metric}
            row["approach"] = approach + wide
            for place, (level, width) in zip(places, widths.items(), strict=True):
                row[f"{level}, {width}"] = f"{statistics.mean(found[head, task, metric, place]):.4f}"
            rows.append(row)
    return rows


def all_win_rows(records: Sequence[Record], widths: Mapping[str, int]) -> list[Row]:
    """Return the win table of each head: on the data sets of each task, on those of mutations, and on all.

    Groups of fewer than `LEAST_SETS` are left out, for shares of them say next to nothing.
    """
    rows = []
    groups = {**{task: (task,) for task in TASKS}, "mutations": tuple(MUTATIONS.values()), "all": TASKS}
    for head, (name, tasks) in product(HEADS, groups.items()):
        means = means_of(each for each in records if each.head == head and each.task in tasks)
        if len(means) >= LEAST_SETS or tasks == TASKS:
            rows += win_rows(means, widths, head=head, **{"data sets": f"{name}, {len(means)}"})
    return rows


def angle_row(spans: Sequence[Tensor]) -> Row:
    """Return what the table says of angles between the added subspaces of several samples."""
    width, directions = spans[0].shape
    angles, chance = angles_between(spans), angles_at_random(directions, width)
    return {
        "added": f"{directions} of {width}",
        "angle, mean": f"{angles.mean():.1f}",
        "angle, largest": f"{angles.amax(1).mean():.1f}",
        "mean at random": f"{chance.mean():.1f}",
        "largest at random": f"{chance.amax(1).mean():.1f}",
    }


def spread_row(samples: Sequence[Sequence[Record]]) -> Row:
    """Return what the table says of a level's scores from several samples."""
    place = samples[0][0].place
    found = [means_of(records) for records in samples]
    by_set = [[means[data][place] for means in found] for data in found[0]]
    deviations = [statistics.stdev(scores) for scores in by_set]
    return {
        "score, mean": f"{statistics.mean(map(statistics.mean, by_set)):.4f}",
        "deviation, mean": f"{statistics.mean(deviations):.4f}",
        "deviation, largest": f"{max(deviations):.4f}",
    }
