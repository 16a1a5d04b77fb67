"""What does a training step cost, in time and memory, against the same head on fair-esm's largest alone?

    python -m benchmarks.speed.training_cost --output FILE

The script asks three questions, each with random weights of the published shapes up to `--level`, a linear
residue head of three classes on all features, AdamW, and `--batch` sequences of `--residues` residues:

    head            The backbones are frozen, and fair-esm's runs under no_grad; ours run in float32 and in
                    bfloat16.
    full            Everything trains, in float32.
    checkpointing   Everything of ours trains; layers are computed again in the backward pass.

Times are medians of steps that everybody takes in turns in one process. Memory is measured in a process for
each contender, in the second step: the peak above the weights, which are all that stands before the first
(gradients and AdamW's moments count). A third step gives gradients away as they come: its peak above what
stood before is what activations take. On a CPU it is the kernel's own record of resident memory, good to a
few MiB.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rd_torch
from benchmarks.options import add_rounds_option, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.speed.batches import Batch
from benchmarks.speed.clock import now
from benchmarks.speed.contenders import CHAIN, FAIR
from benchmarks.speed.meter import MEBI, Meter
from benchmarks.speed.models import add_model_options, levels_until, random_fair, random_stages, where
from benchmarks.speed.processes import in_own_process
from rd_torch.backbone import is_residue
from rd_torch.levels import ALPHABET

STATES = 3
HEAD, FULL = "head", "full"
BFLOAT16, CHECKPOINTING = f"{CHAIN}, bfloat16", f"{CHAIN}, checkpointing"
CONTENDERS = {HEAD: (FAIR, CHAIN, BFLOAT16), FULL: (FAIR, CHAIN, CHECKPOINTING)}
Step = Callable[[], object]


def chain_of(name: str, arguments: argparse.Namespace) -> rd_torch.RDModel:
    """Return the chain with random weights, as the contender's name says."""
    levels = levels_until(arguments)
    backbones = {level.name: random_fair(level, arguments.device) for level in levels}
    chain = rd_torch.RDModel(backbones, random_stages(levels, arguments.device)).train()
    if name == BFLOAT16:
        chain.to(torch.bfloat16)
    if name == CHECKPOINTING:
        chain.gradient_checkpointing_enable()
    return chain


def encoder_of(
    name: str, task: str, arguments: argparse.Namespace
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a contender's module, and its way from tokens to embeddings."""
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
    """Return a training step of a contender, and the parameters that it trains."""
    torch.manual_seed(0)
    module, encode = encoder_of(name, task, arguments)
    device = arguments.device
    width = levels_until(arguments)[-1].width
    head = rd_torch.ResidueHead(width, STATES, task="classification").to(device)
    batch = Batch.of_size(arguments.batch, arguments.residues, device)
    mask = is_residue(batch.tokens, ALPHABET)
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
    """Return everybody's median seconds of a step; they take turns."""
    steps = {name: step_of(name, task, arguments)[0] for name in CONTENDERS[task]}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, step in reversed(steps.items()) if turn % 2 else steps.items():
            start = now(arguments.device)
            step()
            if turn:
                seconds[name].append(now(arguments.device) - start)
        report_progress(f"Round {turn} of {arguments.rounds} of the task {task} is done.")
    return {name: statistics.median(each) for name, each in seconds.items()}


def peaks(name: str, task: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """Return the most bytes that a contender holds above its weights, and in activations alone."""
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
    """Return everybody's peaks, each measured in a process of its own."""
    found = {}
    for name in CONTENDERS[task]:
        found[name] = in_own_process(peaks, name, task, arguments)
        report_progress(f"{name} took {found[name][0] / MEBI:.0f} MiB in the task {task}.")
    return found


def rows_of(task: str, arguments: argparse.Namespace) -> list[Row]:
    """Return a row for each contender in a task."""
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
    """Run the command line."""
    parser = new_parser(__doc__)
    add_model_options(parser, level="150M")
    parser.add_argument("--batch", type=int, default=2, help="Number of sequences, by default %(default)s.")
    parser.add_argument(
        "--residues",
        type=int,
        default=510,
        help="Number of residues in a sequence, by default %(default)s: with <cls> and <eos> 512 tokens.",
    )
    add_rounds_option(parser, 5)
    arguments = parser.parse_args()
    title = (
        f"A training step up to {arguments.level}, {arguments.batch} sequences of {arguments.residues} "
        f"residues, on {where(arguments)}"
    )
    rows = [row for task in CONTENDERS for row in rows_of(task, arguments)]
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
