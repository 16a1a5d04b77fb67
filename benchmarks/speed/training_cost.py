"""What does a training step cost, in time and memory, against the same head on fair-esm's largest alone?

    python -m benchmarks.speed.training_cost --output FILE

Three questions, each with random weights of the published shapes up to `--level`, a linear residue head of
three classes on all features, AdamW, and `--batch` sequences of `--residues` residues:

    head            the backbones are frozen, fair-esm's runs under no_grad; ours in float32 and in bfloat16
    full            everything trains, in float32
    checkpointing   ours, everything trains, layers computed again in the backward pass

Times are medians of steps taken in turns in one process. Memory is measured in a process each, in the second
step: the peak above the weights, which are all that stands before the first (gradients and AdamW's moments
count). A third step gives gradients away as they come: its peak above what stood before is what activations
take. On a CPU it is the kernel's own record of resident memory, good to a few MiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rd_torch
from benchmarks.report import Row, environment, write_result
from benchmarks.speed.contenders import (
    Batch,
    add_model_arguments,
    levels_until,
    random_fair,
    random_stages,
    where,
)
from benchmarks.speed.memory import MEBI, Meter
from rd_torch.tokens import is_residue

STATES = 3
FAIR = "fair-esm"
HEAD, FULL = "head", "full"
CONTENDERS = {
    HEAD: (FAIR, "rd chain", "rd chain, bfloat16"),
    FULL: (FAIR, "rd chain", "rd chain, checkpointing"),
}
Step = Callable[[], object]


def chain_of(name: str, arguments: argparse.Namespace) -> rd_torch.RDModel:
    """The chain with random weights, as the contender's name says."""
    levels = levels_until(arguments)
    backbones = {level.name: random_fair(level, arguments.device) for level in levels}
    chain = rd_torch.RDModel(backbones, random_stages(levels, arguments.device)).train()
    if name.endswith("bfloat16"):
        chain.to(torch.bfloat16)
    if name.endswith("checkpointing"):
        chain.gradient_checkpointing_enable()
    return chain


def encoder_of(
    name: str, task: str, arguments: argparse.Namespace
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A contender's module, and its way from tokens to embeddings."""
    if name != FAIR:
        chain = chain_of(name, arguments)
        return (chain.freeze_backbones() if task == HEAD else chain), chain.encode
    fair = random_fair(levels_until(arguments)[-1], arguments.device).train()
    last = fair.num_layers

    def encode(tokens: Tensor) -> Tensor:
        with torch.set_grad_enabled(task != HEAD):
            return fair(tokens, repr_layers=[last])["representations"][last]

    return fair, encode


def step_of(name: str, task: str, arguments: argparse.Namespace) -> tuple[Step, list[nn.Parameter]]:
    """One training step of a contender, and what it trains."""
    torch.manual_seed(0)
    module, encode = encoder_of(name, task, arguments)
    device = arguments.device
    width = levels_until(arguments)[-1].width
    head = rd_torch.ResidueHead(width, STATES, task="classification").to(device)
    batch = Batch.of(
        ["ACDEFGHIKLMNPQRSTVWY"[k % 20] * arguments.residues for k in range(arguments.batch)], device
    )
    mask = is_residue(batch.tokens)
    labels = torch.randint(STATES, batch.tokens.shape, device=device)
    parts = [head] if task == HEAD else [module, head]
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        head.loss(head(encode(batch.tokens), mask), labels, mask).backward()
        optimizer.step()

    return step, trained


def times(task: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, everybody taking turns."""
    steps = {name: step_of(name, task, arguments)[0] for name in CONTENDERS[task]}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, step in reversed(steps.items()) if turn % 2 else steps.items():
            start = _now(arguments.device)
            step()
            if turn:
                seconds[name].append(_now(arguments.device) - start)
        print(f"{task}: round {turn} of {arguments.rounds} done", file=sys.stderr, flush=True)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peaks(name: str, task: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """Bytes at the most: above the weights, and of activations alone."""
    step, trained = step_of(name, task, arguments)
    meter = Meter(arguments.device)
    meter.restart()
    weights = meter.now()
    step()
    meter.restart()
    step()
    whole = meter.peak() - weights
    for parameter in trained:
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    meter.restart()
    held = meter.now()
    step()
    return whole, meter.peak() - held


def memory(task: str, arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Everybody's peaks, each in a process of its own."""
    found = {}
    for name in CONTENDERS[task]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed.training_cost",
            *sys.argv[1:],
            "--once",
            name,
            task,
        ]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = json.loads(printed.splitlines()[-1])
        print(f"{task}, {name}: {found[name][0] / MEBI:.0f} MiB", file=sys.stderr, flush=True)
    return found


def rows_of(task: str, arguments: argparse.Namespace) -> list[Row]:
    """One row a contender."""
    held = memory(task, arguments)
    seconds = times(task, arguments)
    return [
        {
            "trains": task,
            "contender": name,
            "seconds a step": round(seconds[name], 3),
            "times fair-esm's": round(seconds[name] / seconds[FAIR], 3),
            "peak above the weights, MiB": round(held[name][0] / MEBI),
            "share of fair-esm's": round(held[name][0] / held[FAIR][0], 3),
            "activations, MiB": round(held[name][1] / MEBI),
            "share of fair-esm's activations": round(held[name][1] / held[FAIR][1], 3),
        }
        for name in CONTENDERS[task]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.set_defaults(level="150M")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--residues", type=int, default=510, help="with <cls> and <eos> 512 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", nargs=2, metavar=("CONTENDER", "TASK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(peaks(*arguments.once, arguments)))
        return
    title = (
        f"A training step up to {arguments.level}, {arguments.batch} sequences of {arguments.residues} "
        f"residues, on {where(arguments)}"
    )
    rows = [row for task in CONTENDERS for row in rows_of(task, arguments)]
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
