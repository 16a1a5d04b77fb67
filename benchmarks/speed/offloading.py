"""How fast does a chain run whose weights do not fit into memory, against plain ESM-2 kept on disk likewise?

    python -m benchmarks.speed.offloading --level 3B --output benchmarks/results/offloading-cpu.json

Each contender runs in a process of its own: random weights of the published shapes in bfloat16, all of them
kept on disk by accelerate's `disk_offload`, which reads a module's weights when it is called and drops them
after. It embeds natural proteins of 100 to 500 residues, sorted by length, in batches of each of `--budgets`
tokens, padding counted; files are taken out of the system's page cache before every batch, for memory that
holds no weights does not hold their file either. Of the budgets at which the peak stays below `--gibibytes`
the fastest counts; where there is none, the fastest of all counts, with its peak. The peak is the kernel's
own record of resident memory (VmHWM), weights that are in use and the interpreter included.

The column "tokens a load" gives the real tokens that one reading of the weights serves on average.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import accelerate
import torch
from torch import nn

from benchmarks.options import add_data_option, data_folder, new_parser
from benchmarks.proteins import natural_proteins
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.speed.batches import Batch, batches_of, sample
from benchmarks.speed.contenders import (
    CHAIN,
    FAIR,
    TRANSFORMERS,
    Contender,
    alone,
    fair_contender,
    masked_contender,
    own,
)
from benchmarks.speed.meter import GIBI, Meter
from benchmarks.speed.models import (
    add_model_options,
    levels_until,
    random_fair,
    random_family,
    random_transformers,
    where,
)
from benchmarks.speed.processes import in_own_process


def build(name: str, arguments: argparse.Namespace) -> tuple[nn.Module, Contender]:
    """Return the model of that name, and its way from a batch to embeddings."""
    levels = levels_until(arguments)
    if name == FAIR:
        model = random_fair(levels[-1], "cpu").bfloat16()
        return model, fair_contender(name, model)
    if name == TRANSFORMERS:
        other = random_transformers(levels[-1], torch.bfloat16, "cpu")
        return other, masked_contender(name, other)
    chain = random_family(levels if name == CHAIN else levels[-1:], torch.bfloat16, "cpu").chain
    return chain, own(name, chain)


def forget_files(folder: Path) -> None:
    """Take a folder's files out of the system's page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(contender: Contender, batches: Sequence[Batch], folder: Path) -> float:
    """Return the seconds for all batches; each reads its weights from the disk."""
    seconds = 0.0
    for batch in batches:
        forget_files(folder)
        start = time.perf_counter()
        contender(batch)
        seconds += time.perf_counter() - start
    return seconds


@torch.inference_mode()
def rows_by_budget(name: str, arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Return a row for one contender at every budget, measured in this process."""
    model, contender = build(name, arguments)
    accelerate.disk_offload(model, folder, execution_device="cpu", offload_buffers=True)
    groups = sample("100-500", arguments.tokens, 0, natural_proteins(data_folder(arguments)))
    proteins = [[protein for group in groups for protein in group]]
    meter = Meter("cpu")
    rows: list[Row] = []
    for budget in arguments.budgets:
        batches = batches_of(proteins, budget, "cpu")
        real = sum(batch.real for batch in batches)
        meter.restart()
        seconds = timed(contender, batches, folder)
        rows.append(
            {
                "contender": name,
                "tokens a load": round(real / len(batches)),
                "tokens/s": float(f"{real / seconds:.3g}"),
                "peak, GiB": round(meter.peak() / GIBI, 2),
            }
        )
        report_progress(f"With budget {budget}, {name} ran {rows[-1]['tokens/s']} tokens/s.")
    return rows


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return a row for every contender at its best budget, each measured in its own process."""
    best: list[Row] = []
    for name in (CHAIN, alone(arguments.level), TRANSFORMERS, FAIR):
        with TemporaryDirectory(dir=arguments.folder) as folder:
            rows = in_own_process(rows_by_budget, name, arguments, Path(folder))
        fitting = [row for row in rows if row["peak, GiB"] <= arguments.gibibytes]
        best.append(max(fitting or rows, key=lambda row: row["tokens/s"]))
    chain = best[0]["tokens/s"]
    return [row | {"chain's speed over it": round(chain / row["tokens/s"], 2)} for row in best]


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    add_model_options(parser)
    add_data_option(parser)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="About how many tokens to embed, by default %(default)s."
    )
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[512, 2048], help="Numbers of tokens in a batch to try."
    )
    parser.add_argument(
        "--gibibytes", type=float, default=4, help="Memory that is allowed, by default 4 GiB."
    )
    parser.add_argument(
        "--folder", type=Path, help="Folder for the weights, by default the system's temporary one."
    )
    arguments = parser.parse_args()
    rows = measure(arguments)
    title = (
        f"Weights on disk: the chain up to {arguments.level} in bfloat16, {arguments.gibibytes:g} GiB of "
        f"memory allowed, on {where(arguments)}"
    )
    write_result(title, rows, {**environment(), "accelerate": accelerate.__version__}, arguments.output)


if __name__ == "__main__":
    main()
