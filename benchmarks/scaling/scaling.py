"""What does nesting buy, and what does it cost, against what one would take in its place?

    python -m benchmarks.scaling.scaling --output FOLDER

The script compares embeddings by their width and by their compute, which is the number of parameters in the
layers that run for each token: the backbone's own embedding, of its last layer and of its best; principal
components of the largest backbone alone, at every width; concatenation with principal components; and nested
embeddings, of last layers and of chosen ones, with as many directions as the default adds and with all. All
maps come from the same moments of natural proteins.

Layers are chosen for each data set and split by the generalised cross-validation error of ridge regression on
the half that teaches, so no choice sees the half that judges. Criteria that need no labels choose one chain
for all data sets. Middle layers are taken with the backbone's last LayerNorm and without.

Mean-pooled embeddings are asked for the effects of mutations (each assay's variants with 1, 2, and 3 or more
mutations apart; five random halves) and for melting temperature (the published split). Embeddings of residues
are asked for three-state secondary structure (five sets of training proteins, one of test proteins).
`benchmarks/scaling/probes.py` says what the heads are.

Stability is measured by the same from five disjoint samples of 200 and 1,000 training proteins. The main maps
are those of all five together. None of these proteins is among those that are asked about.

Embeddings, moments, choices and scores are kept in `--cache`: the same command goes on where it was, and a
second run takes what is there. `--output` receives the tables, every score, and three plots.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

import rd_torch
from benchmarks.options import (
    DTYPES,
    add_data_option,
    add_model_option,
    add_scaling_options,
    data_folder,
    new_parser,
)
from benchmarks.result import Row, environment, write_result
from benchmarks.scaling.approaches import (
    BY_CRITERION,
    NESTED_CHOSEN,
    NESTED_LAST,
    OF_MIDDLE,
    PLAIN_LAST,
    RIVALS,
    SCALED,
    SWEEP,
    Approach,
)
from benchmarks.scaling.cache import Cache
from benchmarks.scaling.data import TASKS, read_sets
from benchmarks.scaling.layers import last_layers, layers_by_level, level_of
from benchmarks.scaling.maps import NESTED
from benchmarks.scaling.plots import draw_all
from benchmarks.scaling.probes import LINEAR
from benchmarks.scaling.records import Record
from benchmarks.scaling.study import Fit, Sample, Study, cut_at, disjoint_samples
from benchmarks.scaling.tables import (
    angle_row,
    criterion_rows,
    layer_rows,
    norm_rows,
    rival_rows,
    score_rows,
    spread_row,
)
from benchmarks.scaling.wins import all_win_rows

LAST = next(approach for approach in RIVALS if approach.name == NESTED_LAST)
Tables = dict[str, tuple[str, list[Row]]]
"""What was measured, in words, and rows, by the name of the file."""


def stability(
    study: Study, samples: Sequence[Sequence[str]], sizes: Sequence[int]
) -> tuple[list[Row], list[Record]]:
    """Measure how much maps and scores depend on the sample: a row for each size and level, and every score.

    Angles are the principal ones between the spans of V, the added directions in the coordinates of the
    larger backbone's embedding, of all pairs of samples.

    Args:
        study: The data sets and the cache.
        samples: Five disjoint samples of sequences.
        sizes: Numbers of sequences to take of each sample, rising.
    """
    _, *layers = last_layers(study.cache.widths)
    approach = Approach(NESTED_LAST, NESTED)
    rows: list[Row] = []
    records: list[Record] = []
    for nth, size in enumerate(sizes, start=1):
        spans, fits = [], []
        for number, sequences in enumerate(samples, start=1):
            sample = Sample(f"sample {number}, {size:,} sequences", cut_at(sequences, sizes[:nth]))
            solver = study.solver(sample)
            recipe = solver.recipe(NESTED, last_layers(solver.widths))
            spans.append([stage.V for stage in solver.stages(recipe)])
            fits.append(Fit(sample, solver, [approach]))
        scored = study.run(fits)
        for level, found in zip(map(level_of, layers), zip(*spans, strict=True), strict=True):
            of_level = [[each for each in one if each.level == level] for one in scored]
            rows.append({"sequences": size, "level": level, **angle_row(found), **spread_row(of_level)})
        records += [record for one in scored for record in one]
    return rows, records


class Found(NamedTuple):
    """Scores, by what they are for."""

    rivals: list[Record]
    scaled: list[Record]
    sweep: list[Record]
    criteria: list[Record]

    def linear(self) -> list[Record]:
        """Return the scores of rivals and criteria with the linear head."""
        return [each for each in (*self.rivals, *self.criteria) if each.head == LINEAR]


def measure(study: Study, sample: Sample, rivals: Sequence[Approach], scaled: Sequence[Approach]) -> Found:
    """Return the scores of these rivals and scales, of every layer, and of every criterion."""
    solver = study.solver(sample)
    groups = (rivals, scaled, SWEEP, BY_CRITERION)
    return Found(*study.run([Fit(sample, solver, approaches) for approaches in groups]))


def tables_of(normed: Found, stream: Found, levels: Sequence[str], largest: int) -> Tables:
    """Return the tables of embeddings, which is all but that of stability.

    Args:
        normed: The scores with the last LayerNorm on middle layers.
        stream: Those without it.
        levels: Levels of the family.
        largest: Number of parameters that run in the largest backbone.
    """
    choices = [NESTED_CHOSEN, *(approach.name for approach in BY_CRITERION)]
    criteria = [
        row
        for found, norm in ((normed, "yes"), (stream, "no"))
        for row in criterion_rows(found.linear(), choices, largest, norm)
    ]
    middle = {approach.name for approach in OF_MIDDLE}
    without = [record for record in stream.rivals if record.approach in middle]
    scales = rival_rows(normed.scaled, largest, (SCALED[0].name, f"{NESTED}, as it is"))
    interval = "[95 % bootstrap over data sets]"
    return {
        "scores": ("scores", score_rows(normed.rivals)),
        "rivals": (
            f"price and gain {interval}",
            rival_rows(normed.rivals, largest, (PLAIN_LAST, NESTED_LAST)),
        ),
        "wins": (f"share of data sets where the first wins {interval}", all_win_rows(normed.rivals, levels)),
        "layers": (
            "each layer alone, linear head",
            layer_rows(normed.sweep, stream.sweep, normed.rivals, largest),
        ),
        "criteria": ("ways to choose the layers of nested embeddings, linear head", criteria),
        "norms": ("the last LayerNorm on chosen layers, linear head", norm_rows(normed.rivals, without)),
        "scales": ("scales, nearest neighbours", scales),
    }


def run(
    studies: Sequence[Study],
    samples: Sequence[Sequence[str]],
    sizes: Sequence[int],
    name: str,
    output: Path | None,
) -> None:
    """Compute whatever is missing, print the tables, and write them, every score and the plots.

    Args:
        studies: The data sets and the cache, with the last LayerNorm on middle layers and without.
        samples: Five disjoint samples of sequences.
        sizes: Numbers of sequences to take of each sample, rising.
        name: Name of the model in titles.
        output: Folder to write to; None writes nothing.
    """
    study, _ = studies
    parts = tuple(part for sequences in samples for part in cut_at(sequences, sizes))
    sample = Sample(f"all {sum(map(len, parts)):,} sequences", parts)
    few = [replace(approach, heads=(LINEAR,)) for approach in (LAST, *OF_MIDDLE)]
    normed, stream = measure(study, sample, RIVALS, SCALED), measure(studies[1], sample, few, ())
    rows, spread = stability(study, samples, sizes)
    *_, last = last_layers(study.cache.widths)
    largest = study.cache.costs[last]
    about = f"{name}, {len(study.sets)} data sets, maps from {sample.name}"
    levels = list(layers_by_level(study.cache.widths))
    tables = {
        **tables_of(normed, stream, levels, largest),
        "stability": ("five disjoint samples, nested embeddings of last layers, linear head", rows),
    }
    for kind, (title, table) in tables.items():
        path = output and output / f"scaling_{kind}.json"
        write_result(f"Scaling, {title}: {about}", table, environment(), path)
    if output:
        every = {"normed": chain(*normed, spread), "stream": chain(*stream)}
        lines = [
            json.dumps({"middle layers": norm, **asdict(each)}) for norm in every for each in every[norm]
        ]
        (output / "scaling_every_score.jsonl").write_text("\n".join(lines) + "\n")
        draw_all(normed.rivals, study.solver(sample), largest, output)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__, output="Folder to write tables, scores and plots to.")
    add_data_option(parser)
    parser.add_argument(
        "--proteingym",
        type=Path,
        help="Folder of ProteinGym's files, which take the place of the data's assays.",
    )
    add_model_option(parser)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=TASKS, help="Tasks to ask about, by default all."
    )
    parser.add_argument("--level", help="Last level of the chain, by default the model's.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Device that runs.")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Type of the backbones, by default %(default)s."
    )
    add_scaling_options(parser)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[200, 1_000],
        help="Numbers of sequences in the five samples, rising.",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    arguments = read_arguments()
    data, sizes = data_folder(arguments), arguments.sizes
    if sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise SystemExit(f"expected rising --sizes, each at least 1, got {' '.join(map(str, sizes))}")
    every = read_sets(data, arguments.proteingym, arguments.variants)
    asked = {sequence for each in every for sequence in each.sequences}
    sets = [each for each in every if each.task in arguments.tasks]
    samples = disjoint_samples(data / "natural50_train.fasta.xz", asked, sizes[-1])
    model = rd_torch.RDModel.from_pretrained(
        arguments.model, arguments.level, getattr(torch, arguments.dtype), arguments.device
    )
    if len(model.family()) < 2:
        raise SystemExit(f"expected a chain of two levels or more, got {', '.join(model.family())} alone")
    studies = [Study(Cache(arguments.cache, model, arguments.layers, norm), sets) for norm in (True, False)]
    run(studies, samples, sizes, arguments.model, arguments.output)


if __name__ == "__main__":
    main()
