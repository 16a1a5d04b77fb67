"""How much memory does a forward pass take besides the weights: ours against fair-esm's?

    python -m benchmarks.speed.memory --batch 8 --residues 1022 --output FILE

Each contender runs in a process of its own: random weights of the published shape, a forward pass of 16
tokens that touches them all, then one forward pass of `--batch` sequences of `--residues` residues each,
without padding, in inference mode. On a CPU the peak is the kernel's own record of resident memory
(VmHWM, set back before the pass) less what was resident then; memory that the process had freed is given
back to the system first, so that no contender fills holes unseen. It is good to a few MiB. On CUDA it is
`torch.cuda.max_memory_allocated` less what was allocated before, graphs captured for the pass included.

The result of the pass counts. fair-esm answers final embeddings in the backbone's dtype with logits beside
them; ours answers final embeddings in float32 in every dtype. Nobody asks for attention maps.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.options import add_dtypes_option, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.speed.batches import Batch
from benchmarks.speed.contenders import CHAIN, FAIR, Contender, alone, fair_contender, own
from benchmarks.speed.meter import MEBI, Meter
from benchmarks.speed.models import add_model_options, levels_until, random_fair, random_family, where
from benchmarks.speed.processes import in_own_process

WARM_UP = "M" * 14
"""With `<cls>` and `<eos>` these are 16 tokens."""


def build(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> Contender:
    """Return the contender of that name; nothing else is built."""
    levels = levels_until(arguments)
    if name == FAIR:
        return fair_contender(FAIR, random_fair(levels[-1], arguments.device).to(dtype))
    if name == CHAIN:
        return own(name, random_family(levels, dtype, arguments.device).chain)
    return own(name, random_family(levels[-1:], dtype, arguments.device).chain)


@torch.inference_mode()
def peak_of(name: str, dtype: str, arguments: argparse.Namespace) -> int:
    """Return the peak bytes of one contender in this process."""
    contender = build(name, arguments, getattr(torch, dtype))
    batch = Batch.of_size(arguments.batch, arguments.residues, arguments.device)
    contender(Batch.of([WARM_UP], arguments.device))
    meter = Meter(arguments.device)
    meter.restart()
    before = meter.now()
    contender(batch)
    return meter.peak() - before


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return a row for every contender in every dtype, each measured in its own process."""
    rows: list[Row] = []
    for dtype in arguments.dtype:
        peaks: dict[str, float] = {}
        for name in (FAIR, alone(arguments.level), CHAIN):
            peaks[name] = in_own_process(peak_of, name, dtype, arguments) / MEBI
            report_progress(f"{name} took {peaks[name]:.0f} MiB in {dtype}.")
        rows += [
            {
                "contender": name,
                "dtype": dtype,
                "peak above the weights, MiB": round(peak),
                "share of fair-esm's": round(peak / peaks[FAIR], 3),
            }
            for name, peak in peaks.items()
        ]
    return rows


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    add_model_options(parser)
    add_dtypes_option(parser)
    parser.add_argument("--batch", type=int, default=8, help="Number of sequences, by default %(default)s.")
    parser.add_argument(
        "--residues", type=int, default=1022, help="Number of residues in a sequence, by default %(default)s."
    )
    arguments = parser.parse_args()
    title = (
        f"Peak memory of a forward pass up to {arguments.level}, {arguments.batch} sequences of "
        f"{arguments.residues} residues, on {where(arguments)}"
    )
    write_result(title, measure(arguments), environment(), arguments.output)


if __name__ == "__main__":
    main()
