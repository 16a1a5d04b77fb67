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
from itertools import pairwise

import numpy as np
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
from benchmarks.scaling.cache import Cache
from benchmarks.scaling.data import read_sets
from benchmarks.scaling.maps import PLAIN, Affine, Place, affine_maps, plain_maps
from benchmarks.scaling.probes import HEADS
from benchmarks.scaling.study import Fit, Sample, Study, cut_at, disjoint_samples
from benchmarks.scaling.tables import Record, means_of
from benchmarks.scaling.wins import interval

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Numbers of added directions that are tried, as shares of the larger backbone's width."""

SIZES = (200, 1_000, 5_000)
"""Ends of the parts of the samples, as in `scaling.py`, whose moments are in the cache."""


def maps_of_step(moments: rd_torch.RunningMoments, widths: dict[str, int], level: str) -> dict[Place, Affine]:
    """Return the map of the step to a level for each number of added directions, and the plain one."""
    names = list(widths)
    until = {name: widths[name] for name in names[: names.index(level) + 1]}
    sizes = list(until.values())
    usual = [q - p for p, q in pairwise(sizes)]
    counts = sorted({usual[-1], *(round(share * sizes[-1]) for share in SHARES)})
    later = sum(widths.values()) - sum(sizes)
    plain = Place(PLAIN, level)
    maps = {plain: plain_maps(widths)[plain]}
    for count in counts:
        stages = rd_torch.solve_stages(moments, widths, levels=list(until), added=[*usual[:-1], count])
        matrix, offset = affine_maps("", stages, until)[Place("", level)]
        whole = torch.cat((matrix, matrix.new_zeros(later, len(offset))))
        default = " (default)" if count == usual[-1] else ""
        maps[Place(f"nested, {count} added{default}", level)] = Affine(whole, offset)
    return maps


def rows_of(records: Sequence[Record], level: str) -> list[Row]:
    """Return a row for each head and number of added directions of the step to a level."""
    rows: list[Row] = []
    for head in HEADS:
        chosen = [record for record in records if record.head == head]
        means = means_of(chosen)
        ends = {record.place: record.width for record in chosen}
        for place, width in ends.items():
            scores = np.array([[of_set[place]] for of_set in means.values()])
            plain = np.array([[of_set[Place(PLAIN, level)]] for of_set in means.values()])
            low, high = interval(scores - plain)
            rows.append(
                {
                    "level": level,
                    "head": head,
                    "embedding": place.approach,
                    "features": width,
                    "score, mean": f"{scores.mean():.4f}",
                    "over plain": f"{(scores - plain).mean():+.4f} [{low:+.4f}, {high:+.4f}]",
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
    study = Study(Cache(arguments.cache, model), sets)
    parts = tuple(part for sequences in samples for part in cut_at(sequences, SIZES))
    sample = Sample(f"all {sum(map(len, parts)):,} sequences", parts)
    moments, widths = study.moments(sample), dict(study.cache.widths)
    _, *levels = widths
    fits = [Fit(sample, maps_of_step(moments, widths, level)) for level in levels]
    found = study.run(fits, list(HEADS))
    rows = [row for level, records in zip(levels, found, strict=True) for row in rows_of(records, level)]
    title = f"Numbers of added directions: {arguments.model}, {len(sets)} data sets, maps from {sample.name}"
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
