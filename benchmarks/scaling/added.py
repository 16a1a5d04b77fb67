"""How many directions should a step add where widths hardly grow?

    python -m benchmarks.scaling.added --output FILE

For each step of a family the script solves the stage with several numbers of added directions: as many as
make the nested embedding as wide as the larger backbone's, which is the default, and shares of the larger
width. The stages before it are the default ones. Each embedding is judged as in `scaling.py`, with the same
data sets, heads, moments and cache, beside the larger backbone's own embedding.

A row has the mean score over data sets and splits, and the mean difference from the plain embedding with a
95 % interval of a bootstrap over data sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import rd_torch
from benchmarks.options import (
    add_data_option,
    add_model_option,
    add_scaling_options,
    data_folder,
    new_parser,
)
from benchmarks.result import Row, environment, write_result
from benchmarks.scaling.approaches import PLAIN_LAST, Approach
from benchmarks.scaling.cache import Cache
from benchmarks.scaling.criteria import Chosen
from benchmarks.scaling.data import read_sets
from benchmarks.scaling.layers import Widths, last_layers, layers_by_level, level_of
from benchmarks.scaling.maps import NESTED, PLAIN, Recipe, Solver
from benchmarks.scaling.probes import LINEAR, MLP
from benchmarks.scaling.records import Place, Record, column, means_of, with_interval
from benchmarks.scaling.study import Fit, Sample, Study, cut_at, disjoint_samples

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Numbers of added directions that are tried, as shares of the larger backbone's width."""

SIZES = (200, 1_000)
"""Ends of the parts of the samples, as in `scaling.py`, whose moments are in the cache."""


@dataclass(frozen=True)
class Added(Approach):
    """A nested embedding at one level, whose last step adds another number of directions than the default.

    Attributes:
        level: The level.
        count: Number of directions that the step adds.
    """

    level: str = ""
    count: int = 0

    def recipes(self, solver: Solver, chosen: Chosen) -> dict[str, Recipe]:
        """Return the recipe at the level."""
        end = [level_of(layer) for layer in chosen].index(self.level)
        width = solver.widths[chosen[end - 1]] + self.count
        return {self.level: Recipe(NESTED, chosen[: end + 1], width)}


def approaches_of_step(widths: Widths, level: str) -> list[Approach]:
    """Return the plain embedding, and a nested one for each number of directions that the step may add."""
    last = {level_of(layer): widths[layer] for layer in last_layers(widths)}
    smaller = dict(zip(list(last)[1:], last.values(), strict=False))[level]
    usual, heads = last[level] - smaller, (LINEAR, MLP)
    made: list[Approach] = [Approach(PLAIN_LAST, PLAIN, heads=heads)]
    for count in sorted({usual, *(round(share * last[level]) for share in SHARES)}):
        name = f"nested, {count} added{' (default)' if count == usual else ''}"
        made.append(Added(name, NESTED, heads=heads, level=level, count=count))
    return made


def rows_of(records: Sequence[Record], level: str) -> list[Row]:
    """Return a row for each head and number of added directions of the step to a level."""
    rows: list[Row] = []
    for head in (LINEAR, MLP):
        chosen = [record for record in records if (record.head, record.level) == (head, level)]
        means = means_of(chosen)
        ends = {record.place: record.width for record in chosen}
        for place, width in ends.items():
            scores, plain = column(means, place), column(means, Place(PLAIN_LAST, level))
            rows.append(
                {
                    "level": level,
                    "head": head,
                    "embedding": place.approach,
                    "features": width,
                    "score, mean": f"{scores.mean():.4f}",
                    "over plain": with_interval(scores - plain),
                    "better than plain": f"{int((scores > plain).sum())} of {len(scores)}",
                }
            )
    return rows


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    add_scaling_options(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, and write the result."""
    arguments = read_arguments()
    data = data_folder(arguments)
    sets = read_sets(data, None, arguments.variants)
    asked = {sequence for each in sets for sequence in each.sequences}
    samples = disjoint_samples(data / "natural50_train.fasta.xz", asked, SIZES[-1])
    model = rd_torch.RDModel.from_pretrained(arguments.model, dtype=torch.float32)
    study = Study(Cache(arguments.cache, model, arguments.layers), sets)
    parts = tuple(part for sequences in samples for part in cut_at(sequences, SIZES))
    sample = Sample(f"all {sum(map(len, parts)):,} sequences", parts)
    solver = study.solver(sample)
    _, *levels = layers_by_level(solver.widths)
    found = study.run([Fit(sample, solver, approaches_of_step(solver.widths, level)) for level in levels])
    rows = [row for level, records in zip(levels, found, strict=True) for row in rows_of(records, level)]
    title = f"Numbers of added directions: {arguments.model}, {len(sets)} data sets, maps from {sample.name}"
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
