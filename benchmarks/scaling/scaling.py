"""What does nesting buy, and what does it cost? Scores of every approach at every level of a family.

    python -m benchmarks.scaling.scaling --output FOLDER

The script compares embeddings of equal width: the backbone's own embedding, as it is and rotated to its
principal components; nested ones whose stages predict by principal component regression or by least squares;
and concatenation with principal components. Beside them stands the nested embedding that keeps every added
direction, which is wider. All maps come from the same moments.

Mean-pooled embeddings are asked for the effects of mutations (each assay's variants with 1, 2, and 3 or more
mutations apart; five random halves) and for melting temperature (the published split). Embeddings of residues
are asked for three-state secondary structure (five sets of training proteins, one of test proteins).
`benchmarks/scaling/probes.py` says what the heads are.

Stability is measured by the same from five disjoint samples of 200, 1,000 and 5,000 training proteins. The
main maps are those of all five together. None of these proteins is among those that are asked about.

Embeddings, moments and scores are kept in `--cache`: the same command goes on where it was, and a second run
takes what is there. `--output` receives three tables, every score, and three plots.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

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
from benchmarks.scaling.cache import Cache
from benchmarks.scaling.data import read_sets
from benchmarks.scaling.maps import PCR, affine_maps, all_maps
from benchmarks.scaling.plots import draw_all
from benchmarks.scaling.probes import HEADS, LINEAR
from benchmarks.scaling.study import Fit, Sample, Study, cut_at, disjoint_samples
from benchmarks.scaling.tables import Record, all_win_rows, angle_row, score_rows, spread_row


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
    widths = study.cache.widths
    rows: list[Row] = []
    records: list[Record] = []
    for nth, size in enumerate(sizes, start=1):
        spans, fits = [], []
        for number, sequences in enumerate(samples, start=1):
            sample = Sample(f"sample {number}, {size:,} sequences", cut_at(sequences, sizes[:nth]))
            stages = rd_torch.solve_stages(study.moments(sample), widths)
            spans.append([stage.V for stage in stages])
            fits.append(Fit(sample, affine_maps(PCR, stages, widths)))
        scored = study.run(fits, [LINEAR])
        for level, found in zip(list(widths)[1:], zip(*spans, strict=True), strict=True):
            of_level = [[each for each in one if each.level == level] for one in scored]
            rows.append({"sequences": size, "level": level, **angle_row(found), **spread_row(of_level)})
        records += [record for one in scored for record in one]
    return rows, records


def run(
    study: Study, samples: Sequence[Sequence[str]], sizes: Sequence[int], name: str, output: Path | None
) -> None:
    """Compute whatever is missing, print the tables, and write them, every score and the plots.

    Args:
        study: The data sets and the cache.
        samples: Five disjoint samples of sequences.
        sizes: Numbers of sequences to take of each sample, rising.
        name: Name of the model in titles.
        output: Folder to write to; None writes nothing.
    """
    widths = study.cache.widths
    parts = tuple(part for sequences in samples for part in cut_at(sequences, sizes))
    everything = Sample(f"all {sum(map(len, parts)):,} sequences", parts)
    moments = study.moments(everything)
    maps = all_maps(moments, widths)
    (records,) = study.run([Fit(everything, maps)], list(HEADS))
    rows, spread = stability(study, samples, sizes)
    about = f"{name}, {len(study.sets)} data sets, maps from {everything.name}"
    tables = {
        "scores": (f"Scaling, scores: {about}", score_rows(records, widths)),
        "wins": (
            f"Scaling, share of data sets where the first wins [95 % bootstrap]: {about}",
            all_win_rows(records, widths),
        ),
        "stability": (f"Scaling, five disjoint samples, nested, PCR, linear head: {name}", rows),
    }
    for kind, (title, table) in tables.items():
        write_result(title, table, environment(), output and output / f"scaling_{kind}.json")
    if output:
        lines = [json.dumps(asdict(record)) for record in (*records, *spread)]
        (output / "scaling_every_score.jsonl").write_text("\n".join(lines) + "\n")
        draw_all(records, maps, moments, widths, output)


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
        default=[200, 1_000, 5_000],
        help="Numbers of sequences in the five samples, rising.",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    arguments = read_arguments()
    data, sizes = data_folder(arguments), arguments.sizes
    if sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise SystemExit(f"expected rising --sizes, each at least 1, got {' '.join(map(str, sizes))}")
    sets = read_sets(data, arguments.proteingym, arguments.variants)
    asked = {sequence for each in sets for sequence in each.sequences}
    samples = disjoint_samples(data / "natural50_train.fasta.xz", asked, sizes[-1])
    model = rd_torch.RDModel.from_pretrained(
        arguments.model, arguments.level, getattr(torch, arguments.dtype), arguments.device
    )
    if len(model.family()) < 2:
        raise SystemExit(f"expected a chain of two levels or more, got {', '.join(model.family())} alone")
    study = Study(Cache(arguments.cache, model), sets)
    run(study, samples, sizes, arguments.model, arguments.output)


if __name__ == "__main__":
    main()
