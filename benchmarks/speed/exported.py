"""How near and how fast are a chain's exported files, beside the model that they were made of?

    python -m benchmarks.speed.exported --level 35M --output benchmarks/results/exported-cpu.json

writes the chain up to `--level`, with random weights of the published shapes, as `.onnx` and as `.pt2`, and
runs both beside the model in float32 on the same threads, onnxruntime's included. Each set of sequences is
one padded batch: four natural proteins of one length, four of unequal lengths, or one of 1,022 residues. All
take turns for `--rounds` rounds after one untimed pass; speeds are of medians. The error is the largest over
all features and tokens, in standard deviations of the model's embeddings.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import rd_torch
from benchmarks.report import Row, environment, write_result
from benchmarks.speed.contenders import (
    Batch,
    add_data_argument,
    add_model_arguments,
    levels_until,
    natural_proteins,
    random_family,
    where,
)
from rd_torch.exporting import FORMATS


def batches_of(proteins: list[str]) -> dict[str, Batch]:
    """The three batches by name."""
    long = [protein for protein in proteins if len(protein) == 1022][:1]
    equal = [protein[:250] for protein in proteins if len(protein) >= 250][:4]
    unequal = [protein[:size] for protein, size in zip(equal, (60, 120, 180, 250), strict=True)]
    named = {"4 x 250": equal, "60, 120, 180, 250": unequal, "1022": long}
    return {name: Batch.of(sequences, "cpu") for name, sequences in named.items()}


@torch.no_grad()
def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """One row a file and batch."""
    model = random_family(levels_until(arguments), torch.float32, "cpu").chain
    runs: dict[str, Callable[[Tensor], Tensor]] = {"model": model.encode}
    seconds_to_write = {}
    for suffix, form in FORMATS.items():
        start = time.perf_counter()
        rd_torch.export(model, folder / f"chain{suffix}")
        seconds_to_write[suffix] = round(time.perf_counter() - start)
        run = form.load(folder / f"chain{suffix}")
        runs[suffix] = lambda tokens, run=run: run(tokens)[0]
    rows = []
    for name, batch in batches_of(natural_proteins(arguments.data)).items():
        got = {kind: run(batch.tokens) for kind, run in runs.items()}
        unit = got["model"][batch.mask.bool()].std()
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        for number in range(arguments.rounds):
            for kind in runs if number % 2 == 0 else reversed(runs):
                start = time.perf_counter()
                runs[kind](batch.tokens)
                seconds[kind].append(time.perf_counter() - start)
        median = {kind: statistics.median(each) for kind, each in seconds.items()}
        rows += [
            {
                "file": suffix,
                "residues": name,
                "error, largest": float(f"{float((got[suffix] - got['model']).abs().max() / unit):.2g}"),
                "speed over the model's": round(median["model"] / median[suffix], 2),
                "seconds to write": seconds_to_write[suffix],
            }
            for suffix in FORMATS
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_data_argument(parser)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    title = f"Exported files of the chain up to {arguments.level}, float32, on {where(arguments)}"
    machine = {**environment(), "onnxruntime": version("onnxruntime")}
    write_result(title, rows, machine, arguments.output)


if __name__ == "__main__":
    main()
