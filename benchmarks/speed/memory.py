"""How much memory does a forward pass take besides the weights: ours against fair-esm's?

    python -m benchmarks.speed.memory --batch 8 --residues 1022 --output FILE

Each contender runs in a process of its own: random weights of the published shape, a forward pass of 16
tokens that touches them all, then one forward pass of `--batch` sequences of `--residues` residues each,
without padding, in inference mode. On a CPU the peak is the kernel's own record of resident memory
(VmHWM, set back before the pass) less what was resident then; memory that the process had freed is given
back to the system first, so that no contender fills holes unseen. It is good to a few MiB. On CUDA it is
`torch.cuda.max_memory_allocated` less what was allocated before, graphs captured for the pass included.

The result of the pass counts: final embeddings, which fair-esm answers in the backbone's dtype with logits
beside them, and ours in float32 in every dtype. Nobody asks for attention maps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.report import Row, environment, write_result
from benchmarks.speed.contenders import (
    CHAIN,
    DTYPES,
    FAIR,
    Batch,
    Contender,
    add_model_arguments,
    alone,
    fair_contender,
    levels_until,
    own,
    random_fair,
    random_family,
    where,
)

MEBI = 2**20
WARM_UP = "M" * 14
"""With `<cls>` and `<eos>` 16 tokens."""


class Meter:
    """Memory that this process holds on a device, in bytes: now, and at the most since the last restart."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def restart(self) -> None:
        """Gives freed memory back to the system, and lets the peak start from what is held now."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from VmRSS

    def now(self) -> int:
        """What is held now."""
        return torch.cuda.memory_allocated() if self._cuda else _resident("VmRSS")

    def peak(self) -> int:
        """What was held at the most."""
        if self._cuda:
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")


def _resident(entry: str) -> int:
    """Bytes that `/proc/self/status` states: VmRSS now, VmHWM at the most."""
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"expected {entry} in /proc/self/status, got none: this needs Linux")
    return int(found[1]) * 1024


def build(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> Contender:
    """The contender of that name and nothing else."""
    levels = levels_until(arguments)
    if name == FAIR:
        return fair_contender(FAIR, random_fair(levels[-1], arguments.device).to(dtype))
    if name == CHAIN:
        return own(name, random_family(levels, dtype, arguments.device).chain)
    return own(name, random_family(levels[-1:], dtype, arguments.device).chain)


@torch.inference_mode()
def measure_once(name: str, dtype: str, arguments: argparse.Namespace) -> int:
    """Peak bytes of one contender in this process."""
    contender = build(name, arguments, getattr(torch, dtype))
    batch = Batch.of(
        ["ACDEFGHIKLMNPQRSTVWY"[k % 20] * arguments.residues for k in range(arguments.batch)],
        arguments.device,
    )
    contender.encode(Batch.of([WARM_UP], arguments.device))
    meter = Meter(arguments.device)
    meter.restart()
    before = meter.now()
    contender.encode(batch)
    return meter.peak() - before


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Every contender in every dtype, each in its own process; one row each."""
    rows: list[Row] = []
    for dtype in arguments.dtype:
        peaks = {}
        for name in (FAIR, alone(arguments.level), CHAIN):
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--once", name, dtype]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            peaks[name] = json.loads(printed.splitlines()[-1]) / MEBI
            print(f"{name}, {dtype}: {peaks[name]:.0f} MiB", file=sys.stderr, flush=True)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--residues", type=int, default=1022)
    parser.add_argument("--once", nargs=2, metavar=("CONTENDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(measure_once(*arguments.once, arguments))
        return
    title = (
        f"Peak memory of a forward pass up to {arguments.level}, {arguments.batch} sequences of "
        f"{arguments.residues} residues, on {where(arguments)}"
    )
    write_result(title, measure(arguments), environment(), arguments.output)


if __name__ == "__main__":
    main()
