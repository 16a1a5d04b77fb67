"""By which distance are the neighbours of nested embeddings right?

    python -m benchmarks.scaling.similarity --output FILE

Added features vary less than the first ones, so that a cosine of nested vectors sees mostly the first block.
The script finds neighbours by the cosine of vectors as they are; centred; and centred and scaled, by feature
or by block. It does so at the width of every level. Means and variances come from what is known, never from
what is asked for.

- Families: of the 22 proteins of `benchmarks/demo.fasta`, the share whose nearest other is of their family.
- Melting temperature: Spearman correlation with the mean of the ten nearest known proteins.
- Secondary structure: the share of residues whose class is the most frequent among the ten nearest known
  residues.

Intervals are 95 % of a bootstrap over the proteins that are asked for, of the difference from centred
vectors.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

import rd_torch
from benchmarks.options import LAYERS, add_data_option, add_model_option, data_folder, new_parser
from benchmarks.result import Row, environment, write_result
from benchmarks.scaling.cache import Cache
from benchmarks.scaling.data import DataSet, melting_set, structure_set
from benchmarks.scaling.layers import last_layers, level_of
from rd_torch.reading import Fasta

FASTA = Path(__file__).parents[1] / "demo.fasta"
NEIGHBOURS = 10
MOST_RESIDUES = 6_000
"""Number of residues that are known, and that are asked for, at the most."""

DRAWS = 1_000
CENTRED = "centred"
Transform = Callable[[np.ndarray], np.ndarray]


class Task(NamedTuple):
    """What is to be told from neighbours.

    Attributes:
        name: Name of the task.
        known: `(known, width)` vectors with labels.
        labels: Labels of these.
        asked: `(asked, width)` vectors whose labels are to be told.
        truth: Labels of these.
        groups: Protein of each of these.
    """

    name: str
    known: np.ndarray
    labels: np.ndarray
    asked: np.ndarray
    truth: np.ndarray
    groups: np.ndarray


def transforms(known: np.ndarray, ends: list[int]) -> dict[str, Transform]:
    """Return what may be done to vectors before their cosines, from the vectors that are known.

    Args:
        known: `(known, width)` vectors.
        ends: Width at which each level ends.
    """
    mean, deviations = known.mean(0), known.std(0)
    starts = [0, *ends[:-1]]
    blocks = np.concatenate(
        [
            np.full(end - start, np.sqrt(np.square(deviations[start:end]).mean()))
            for start, end in zip(starts, ends, strict=True)
        ]
    )
    return {
        "as they are": lambda vectors: vectors,
        CENTRED: lambda vectors: vectors - mean,
        "centred, scaled by block": lambda vectors: (vectors - mean) / blocks,
        "centred, scaled by feature": lambda vectors: (vectors - mean) / deviations,
    }


def ways_of_chain(model: rd_torch.RDModel) -> dict[str, Transform]:
    """Return the same with the means and deviations that a fitted chain has of residues."""
    if model.reconstructor is None or not model.reconstructor.is_known:
        return {}
    mean, deviations = (part.numpy() for part in model.reconstructor.spread)
    return {"centred, scaled by feature, as the chain knows": lambda vectors: (vectors - mean) / deviations}


def nearest(asked: np.ndarray, known: np.ndarray, same: bool, count: int) -> np.ndarray:
    """Return the places of the known vectors of the largest cosine, `(asked, count)`.

    Args:
        asked: `(asked, width)` vectors.
        known: `(known, width)` vectors.
        same: Whether these are the same rows, of which none is its own neighbour.
        count: Number of neighbours.
    """
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (asked, known)]
    found = []
    for start in range(0, len(asked), 500):
        cosines = unit[0][start : start + 500] @ unit[1].T
        if same:
            np.fill_diagonal(cosines[:, start:], -np.inf)
        found.append(np.argpartition(-cosines, count - 1, axis=1)[:, :count])
    return np.concatenate(found)


def tell(task: Task, transform: Transform, width: int) -> np.ndarray:
    """Return what neighbours tell of each that is asked for: whether a class is right, or a number."""
    known, asked = (transform(each)[:, :width] for each in (task.known, task.asked))
    if task.name.startswith("families"):
        near = nearest(asked, known, True, 1)
        return (task.labels[near[:, 0]] == task.truth).astype(float)
    labels = task.labels[nearest(asked, known, False, NEIGHBOURS)]
    if labels.dtype.kind == "f":
        return labels.mean(1)
    votes = np.stack([(labels == label).sum(1) for label in range(int(task.labels.max()) + 1)], axis=1)
    return (votes.argmax(1) == task.truth).astype(float)


def score(task: Task, told: np.ndarray, rows: np.ndarray) -> float:
    """Return the share of rows that are right, or the rank correlation with the truth."""
    if task.truth.dtype.kind != "f":
        return float(told[rows].mean())
    return float(np.corrcoef(rankdata(told[rows]), rankdata(task.truth[rows]))[0, 1])


def bootstrap(task: Task, told: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two scores over proteins that are drawn again."""
    generator = np.random.default_rng(0)
    places = [np.flatnonzero(task.groups == group) for group in np.unique(task.groups)]
    differences = []
    for _ in range(DRAWS):
        drawn = generator.integers(len(places), size=len(places))
        rows = np.concatenate([places[each] for each in drawn])
        differences.append(score(task, told, rows) - score(task, base, rows))
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def families(model: rd_torch.RDModel) -> Task:
    """Return the task of the proteins of a few families."""
    proteins = list(Fasta(FASTA))
    vectors = np.asarray(rd_torch.embed(model, [protein.sequence for protein in proteins]))
    names = [protein.identifier.split("|")[-1].split("_")[0] for protein in proteins]
    labels = np.unique(names, return_inverse=True)[1]
    return Task("families, nearest of 21", vectors, labels, vectors, labels, np.arange(len(labels)))


def nest(model: rd_torch.RDModel, cache: Cache, data: DataSet) -> np.ndarray:
    """Return `(rows, width)` nested vectors of a data set."""
    raw = dict(zip(cache.widths, cache.rows(data).split(list(cache.widths.values()), dim=1), strict=True))
    return model.combine({level_of(layer): raw[layer] for layer in last_layers(raw)}).numpy()


def melting(vectors: np.ndarray, data: DataSet) -> Task:
    """Return the task of melting temperatures."""
    ((known, asked),) = data.splits
    labels = data.labels.astype(float)
    return Task(
        "melting temperature, Spearman",
        vectors[known],
        labels[known],
        vectors[asked],
        labels[asked],
        np.arange(len(asked)),
    )


def structure(vectors: np.ndarray, data: DataSet) -> Task:
    """Return the task of residues' secondary structure."""
    protein = np.repeat(np.arange(len(data.sequences)), [len(each) for each in data.sequences])
    split = np.unique(np.concatenate([known for known, _ in data.splits])), data.splits[0][1]
    generator = random.Random(0)
    known, asked = (
        np.array(sorted(generator.sample(list(rows), min(MOST_RESIDUES, len(rows))))) for rows in split
    )
    return Task(
        "secondary structure, accuracy",
        vectors[known],
        data.labels[known],
        vectors[asked],
        data.labels[asked],
        protein[asked],
    )


def rows_of(task: Task, model: rd_torch.RDModel) -> list[Row]:
    """Return a row for each level and way to compare vectors."""
    rows: list[Row] = []
    widths = model.config.widths
    ways = transforms(task.known.astype(np.float64), list(widths.values())) | ways_of_chain(model)
    everything = np.arange(len(task.truth))
    for level, width in widths.items():
        told = {name: tell(task, way, width) for name, way in ways.items()}
        for name, values in told.items():
            low, high = bootstrap(task, values, told[CENTRED])
            gain = score(task, values, everything) - score(task, told[CENTRED], everything)
            rows.append(
                {
                    "task": task.name,
                    "level": level,
                    "features": width,
                    "cosine of vectors": name,
                    "score": f"{score(task, values, everything):.4f}",
                    "over centred": "" if name == CENTRED else f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]",
                }
            )
    return rows


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--cache", type=Path, default=Path("scaling-cache"), help="Folder for what is kept between runs."
    )
    return parser.parse_args()


def main() -> None:
    """Measure, and write the result."""
    arguments = read_arguments()
    data: Path = data_folder(arguments)
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    cache = Cache(arguments.cache, model, LAYERS)
    melted, structured = melting_set(data), structure_set(data)
    tasks = [
        families(model),
        melting(nest(model, cache, melted), melted),
        structure(nest(model, cache, structured), structured),
    ]
    rows = [row for task in tasks for row in rows_of(task, model)]
    title = f"Cosines of nested vectors: {arguments.model}"
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
