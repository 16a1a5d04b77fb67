"""How near and how fast are a chain's exported files, beside the model that they were made of?

    python -m benchmarks.speed.exported --level 35M --output benchmarks/results/exported-cpu.json

The script writes the chain up to `--level`, with random weights of the published shapes, as `.onnx` and as
`.pt2`, and runs both beside the model in float32 on the same threads, onnxruntime's included. Each set of
sequences is one padded batch: four natural proteins of one length, four of unequal lengths, or one of 1,022
residues. All take turns for `--rounds` rounds after one untimed pass; speeds are of medians. The error is the
largest over all features and tokens, in standard deviations of the model's embeddings.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import rd_torch
from benchmarks.options import add_data_option, add_rounds_option, data_folder, new_parser
from benchmarks.proteins import MAX_RESIDUES, natural_proteins
from benchmarks.result import Row, environment, write_result
from benchmarks.speed.batches import Batch
from benchmarks.speed.models import add_model_options, levels_until, random_family, where
from rd_torch.exporting import EXPORTERS

Run = Callable[[Tensor], Tensor]
MODEL = "model"


def padded_batches(proteins: list[str]) -> dict[str, Batch]:
    """Return the three batches by name."""
    long = [protein for protein in proteins if len(protein) == MAX_RESIDUES][:1]
    equal = [protein[:250] for protein in proteins if len(protein) >= 250][:4]
    unequal = [protein[:size] for protein, size in zip(equal, (60, 120, 180, 250), strict=True)]
    named = {"4 x 250": equal, "60, 120, 180, 250": unequal, "1022": long}
    return {name: Batch.of(sequences, "cpu") for name, sequences in named.items()}


def write_and_load(model: rd_torch.RDModel, path: Path) -> tuple[Run, int]:
    """Export a model; return what the file runs, and the seconds that writing it took."""
    start = time.perf_counter()
    rd_torch.export(model, path)
    seconds = time.perf_counter() - start
    run = EXPORTERS[path.suffix].load(path)
    return lambda tokens: run(tokens)[0], round(seconds)


def median_seconds(runs: Mapping[str, Run], tokens: Tensor, rounds: int) -> dict[str, float]:
    """Return everybody's median seconds for a batch; they take turns, every other round in reversed order."""
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds):
        for kind in runs if number % 2 == 0 else reversed(list(runs)):
            start = time.perf_counter()
            runs[kind](tokens)
            seconds[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(each) for kind, each in seconds.items()}


@torch.no_grad()
def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Return a row for each file and batch.

    Args:
        arguments: The command line.
        folder: Where to write the files.
    """
    model = random_family(levels_until(arguments), torch.float32, "cpu").chain
    runs: dict[str, Run] = {MODEL: model.encode}
    seconds_to_write = {}
    for suffix in EXPORTERS:
        runs[suffix], seconds_to_write[suffix] = write_and_load(model, folder / f"chain{suffix}")
    rows: list[Row] = []
    for name, batch in padded_batches(natural_proteins(data_folder(arguments))).items():
        got = {kind: run(batch.tokens) for kind, run in runs.items()}
        unit = got[MODEL][batch.mask.bool()].std()
        median = median_seconds(runs, batch.tokens, arguments.rounds)
        rows += [
            {
                "file": suffix,
                "residues": name,
                "error, largest": float(f"{float((got[suffix] - got[MODEL]).abs().max() / unit):.2g}"),
                "speed over the model's": round(median[MODEL] / median[suffix], 2),
                "seconds to write": seconds_to_write[suffix],
            }
            for suffix in EXPORTERS
        ]
    return rows


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    add_model_options(parser)
    add_data_option(parser)
    add_rounds_option(parser, 5)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    title = f"Exported files of the chain up to {arguments.level}, float32, on {where(arguments)}"
    machine = {**environment(), "onnxruntime": version("onnxruntime")}
    write_result(title, rows, machine, arguments.output)


if __name__ == "__main__":
    main()
