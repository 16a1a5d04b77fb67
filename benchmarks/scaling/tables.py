"""The tables: scores by task, rivals, scales, layers, criteria, and stability."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from benchmarks.result import Row
from benchmarks.scaling.angles import angles_at_random, angles_between
from benchmarks.scaling.approaches import NESTED_CHOSEN, NESTED_LAST, PLAIN_BEST, SWEEP
from benchmarks.scaling.layers import last_layers, layers_by_level, level_of, number_of
from benchmarks.scaling.records import Place, Record, column, costs_of_places, means_of, with_interval

METRICS = ("Spearman", "accuracy", "macro AUPR")


def score_rows(records: Sequence[Record]) -> list[Row]:
    """Return a row for each head, task, metric and approach: at each level the mean over sets and splits."""
    found: dict[tuple[str, str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    sets: dict[str, set[str]] = defaultdict(set)
    for record in records:
        sets[record.task].add(record.data)
        for metric in METRICS:
            if metric in record.scores:
                key = (record.head, record.task, metric, record.approach)
                found[key][record.level].append(record.scores[metric])
    return [
        {
            "head": head,
            "task": task,
            "data sets": len(sets[task]),
            "metric": metric,
            "approach": approach,
            **{level: f"{statistics.mean(scores):.4f}" for level, scores in by_level.items()},
        }
        for (head, task, metric, approach), by_level in found.items()
    ]


def rival_rows(records: Sequence[Record], largest: int, rivals: Sequence[str]) -> list[Row]:
    """Return a row for each head, approach and level, with its price and what it gains over rivals.

    Args:
        records: The scores.
        largest: Number of parameters that run in the largest backbone.
        rivals: Names of the approaches that each is held against at the same level, and the first of them
            at the last level too, where it is dearest.
    """
    rows = []
    for head in dict.fromkeys(record.head for record in records):
        chosen = [record for record in records if record.head == head]
        means, costs = means_of(chosen), costs_of_places(chosen)
        *_, end = dict.fromkeys(record.level for record in chosen)
        for place, width in {record.place: record.width for record in chosen}.items():
            scores = column(means, place)
            others = {f"over {rival}": Place(rival, place.level) for rival in rivals}
            others[f"over {rivals[0]}, at {end}"] = Place(rivals[0], end)
            gains = {name: scores - column(means, other) for name, other in others.items()}
            rows.append(
                {
                    "head": head,
                    "approach": place.approach,
                    "level": place.level,
                    "features": width,
                    "compute": f"{costs[place] / largest:.3f}",
                    "score, mean": f"{scores.mean():.4f}",
                    **{name: with_interval(gain) for name, gain in gains.items()},
                }
            )
    return rows


def norm_rows(normed: Sequence[Record], stream: Sequence[Record]) -> list[Row]:
    """Return a row for each approach and level: scores with the last LayerNorm and without."""
    rows = []
    for head in dict.fromkeys(record.head for record in stream):
        one, other = (
            means_of(record for record in records if record.head == head) for records in (normed, stream)
        )
        for place in next(iter(other.values())):
            yes, no = column(one, place), column(other, place)
            rows.append(
                {
                    "head": head,
                    "approach": place.approach,
                    "level": place.level,
                    "with the norm": f"{yes.mean():.4f}",
                    "without": f"{no.mean():.4f}",
                    "with over without": with_interval(yes - no),
                }
            )
    return rows


def layer_rows(
    normed: Sequence[Record], stream: Sequence[Record], rivals: Sequence[Record], largest: int
) -> list[Row]:
    """Return a row for each layer alone: its score, and how often labels of training rows choose it.

    Args:
        normed: The scores of layers alone, with the last LayerNorm on middle ones.
        stream: Those without it.
        rivals: The scores of rivals.
        largest: Number of parameters that run in the largest backbone.
    """
    (name,) = (approach.name for approach in SWEEP)
    one, other = means_of(normed), means_of(stream)
    costs = costs_of_places(normed)
    layers = list(dict.fromkeys(record.level for record in normed))
    ends = dict(zip(layers_by_level(layers), last_layers(layers), strict=True))
    taken = {approach: _shares_taken(rivals, approach) for approach in (PLAIN_BEST, NESTED_CHOSEN)}
    rows = []
    for layer in layers:
        scores, last = column(one, Place(name, layer)), column(one, Place(name, ends[level_of(layer)]))
        rows.append(
            {
                "layer": layer,
                "compute": f"{costs[Place(name, layer)] / largest:.3f}",
                "score, mean": f"{scores.mean():.4f}",
                "over the last layer": with_interval(scores - last),
                "without the norm": f"{column(other, Place(name, layer)).mean():.4f}",
                "with over without the norm": with_interval(scores - column(other, Place(name, layer))),
                **{
                    f"share of {approach}": f"{shares.get(layer, 0):.2f}"
                    for approach, shares in taken.items()
                },
            }
        )
    return rows


def _shares_taken(records: Sequence[Record], approach: str) -> dict[str, float]:
    """Return on what share of data sets and splits an approach takes a layer of its backbone."""
    chosen = {
        (each.data, each.split, each.level): each.layers[-1] for each in records if each.approach == approach
    }
    questions = len({key[:2] for key in chosen})
    return {layer: count / questions for layer, count in Counter(chosen.values()).items()}


def criterion_rows(records: Sequence[Record], names: Sequence[str], largest: int, norm: str) -> list[Row]:
    """Return a row for each way to choose layers: nested embeddings, against those of last layers.

    Args:
        records: The scores with one head.
        names: Names of the approaches.
        largest: Number of parameters that run in the largest backbone.
        norm: Whether the last LayerNorm acts on middle layers, in words.
    """
    means, costs = means_of(records), costs_of_places(records)
    levels = list(dict.fromkeys(each.level for each in records if each.approach == NESTED_LAST))
    chosen: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for record in records:
        if record.level == levels[-1]:
            chosen[record.approach].add(record.layers)
    rows = []
    for name in names:
        gains = np.hstack(
            [column(means, Place(name, level)) - column(means, Place(NESTED_LAST, level)) for level in levels]
        )
        layers = next(iter(chosen[name])) if len(chosen[name]) == 1 else ()
        rows.append(
            {
                "choice": name,
                "norm on middle layers": norm,
                "layers": " ".join(str(number_of(each)) for each in layers) or "of each data set and split",
                "compute": f"{costs[Place(name, levels[-1])] / largest:.3f}",
                f"score at {levels[-1]}": f"{column(means, Place(name, levels[-1])).mean():.4f}",
                f"over last layers at {levels[-1]}": with_interval(gains[:, -1:]),
                "over last layers, all levels": with_interval(gains),
            }
        )
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
