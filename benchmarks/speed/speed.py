"""How fast is the chain against its largest backbone alone, and both against what people use?

    python -m benchmarks.speed.speed --dtype float32 bfloat16 --lengths 100-500 256 1022 --output FILE

The script runs models with random weights of the published shapes: the chain up to `--level`, its backbones
one by one, and the largest one's shape in fair-esm, in transformers with scaled-dot-product attention (SDPA)
and, on CUDA, in FAESM; for the levels of ESM-C, which are 300M, 600M and 6B, in transformers alone. Every
contender gets the same sequences, sorted by length, cut at a token budget and tokenised before the clock
runs, in inference mode, on the same threads, and answers with the padded final embeddings.

Each contender gets the budget that suits it: a first pass times everybody once at each of `--budgets`. Then
everybody takes turns for `--rounds` rounds, each at its own budget, and every other round runs in reversed
order. Right before each clock a contender runs untimed, on CUDA all of its batches, on a CPU its smallest, so
that nobody pays for what another left in the caches. Figures are of medians over the rounds; the spread is
(slowest - fastest) / median. The column tokens/s counts real tokens, `<cls>` and `<eos>` too, but no padding.

The row "sum of own backbones alone" adds the times of each of our backbones as a model by itself, at its own
budget: the chain has the maps besides, and saves packing. Ours answer in float32 in every dtype, which is in
the clock; so are fair-esm's logits (0.3 % of its work), for it cannot be told not to compute them. Our
largest backbone and fair-esm's, or transformers' for ESM-C, share their weights and must agree before
anything is timed.

`--lengths` takes "validation" (natural proteins as they come), "100-500" (those of so many residues) or a
number (random residues, at least two sequences). Of natural proteins it takes four groups of neighbours in
length, at the quantiles 1/8, 3/8, 5/8 and 7/8, each as large as the largest budget or a quarter of `--tokens`
if that is more: batches are as in a proteome that is sorted by length. All are cut at 1,022 residues.

On CUDA two columns are added. The peak memory above the weights is what a contender's batches, warm-up, fused
copies and captured graphs take at its budget (graphs of budgets that were tried before stay and count). The
share of the card's bf16 rate is 2 x parameters of the transformer layers x real tokens/s over the rate of a
product of two matrices of size 8192; attention counts as nothing. TF32 is left as PyTorch has it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.options import add_data_option, add_dtypes_option, add_rounds_option, data_folder, new_parser
from benchmarks.proteins import natural_proteins
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.speed.batches import Batch, batches_of, sample
from benchmarks.speed.clock import matrix_rate, now
from benchmarks.speed.contenders import (
    CHAIN,
    FAESM,
    FAIR,
    FAIR_FLOAT32,
    TRANSFORMERS,
    Contender,
    alone,
    contenders,
)
from benchmarks.speed.meter import GIBI
from benchmarks.speed.models import add_model_options, levels_until, where
from rd_torch.levels import ESM2_LEVELS, ESMC_LEVELS

BUDGETS = {"cpu": [256, 512, 1024], "cuda": [8192, 16384, 32768]}
TOKENS = {"cpu": 4096, "cuda": 131_072}
OPTIONAL = {"fair-esm-float32": FAIR_FLOAT32, "transformers": TRANSFORMERS, "faesm": FAESM}


@dataclass(eq=False)
class Entry:
    """A contender in the running.

    Attributes:
        contender: Who runs.
        first: By budget, seconds of the first pass.
        largest: By budget, number of tokens in the largest batch, padding counted.
        peaks: By budget, bytes above the weights, on CUDA.
        kept: Number of bytes on the card that it has not given back.
        rounds: Seconds of each round.
    """

    contender: Contender
    first: dict[int, float] = field(default_factory=dict)
    largest: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    kept: int = 0
    rounds: list[float] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Return the budget at which it was fastest in the first pass."""
        return min(self.first, key=self.first.__getitem__)


def plans_of(groups: Sequence[Sequence[str]], budgets: Sequence[int], device: str) -> dict[int, list[Batch]]:
    """Return batches by budget, without budgets that cut no other batches than a smaller one."""
    plans: dict[int, list[Batch]] = {}
    seen = set()
    for budget in sorted(budgets):
        batches = batches_of(groups, budget, device)
        shapes = tuple(batch.tokens.shape for batch in batches)
        if shapes not in seen:
            seen.add(shapes)
            plans[budget] = batches
    return plans


@torch.inference_mode()
def check(entries: Sequence[Entry], largest: str, device: str) -> None:
    """Stop unless our largest backbone and the one that shares its weights agree."""
    batch = Batch.of(["MQIFVKTLTGKTITLEVEPS" * 5, "MKV"], device)
    named = {entry.contender.name: entry.contender for entry in entries}
    reference = FAIR if FAIR in named else TRANSFORMERS
    ours, theirs = (named[name](batch)[batch.mask.bool()] for name in (largest, reference))
    allowed = 1e-3 if theirs.dtype == torch.float32 else 0.05
    difference = float((ours - theirs).abs().mean() / theirs.float().std())
    if not difference < allowed:
        raise SystemExit(
            f"expected {largest} within {allowed} of {reference} on average, got {difference:.2g}"
        )


@torch.inference_mode()
def seconds_of(contender: Contender, batches: Sequence[Batch], device: str) -> float:
    """Return the seconds that all batches take, right after some of them ran untimed."""
    smallest = min(batches, key=lambda batch: batch.tokens.numel())
    for batch in batches if device == "cuda" else [smallest]:
        contender(batch)
    start = now(device)
    for batch in batches:
        contender(batch)
    return now(device) - start


def first_pass(entry: Entry, plans: dict[int, list[Batch]], device: str) -> None:
    """Time a contender once at each budget; on CUDA take its peak memory too."""
    entry.first, entry.peaks, entry.rounds = {}, {}, []
    entry.largest = {budget: max(b.tokens.numel() for b in plan) for budget, plan in plans.items()}
    for budget, batches in plans.items():
        if device == "cpu":
            entry.first[budget] = seconds_of(entry.contender, batches, device)
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            entry.first[budget] = seconds_of(entry.contender, batches, device)
            entry.peaks[budget] = entry.kept + torch.cuda.max_memory_allocated() - allocated
            torch.cuda.empty_cache()
            entry.kept += torch.cuda.memory_reserved() - reserved
        report_progress(
            f"{entry.contender.name} took {entry.first[budget]:.2f} s in batches of {budget} tokens."
        )


def compete(entries: Sequence[Entry], plans: dict[int, list[Batch]], rounds: int, device: str) -> None:
    """Run the first pass of everybody, then the rounds in alternating order."""
    for entry in entries:
        first_pass(entry, plans, device)
    for number in range(rounds):
        for entry in entries if number % 2 == 0 else reversed(entries):
            entry.rounds.append(seconds_of(entry.contender, plans[entry.budget], device))
        report_progress(f"Round {number + 1} of {rounds} is done.")


def summed(entries: Sequence[Entry]) -> Entry:
    """Return our backbones by themselves, one after another, as one entry."""
    total = Entry(Contender("sum of own backbones alone", None, sum(e.contender.parameters for e in entries)))
    total.rounds = [sum(seconds) for seconds in zip(*(entry.rounds for entry in entries), strict=True)]
    return total


def rows_of(
    entries: Sequence[Entry], names: Sequence[str], tokens: int, labels: Row, rate: float | None
) -> list[Row]:
    """Return a row for each contender.

    Args:
        entries: Everybody, after the rounds.
        names: Names of our backbones alone, smallest first.
        tokens: Number of real tokens of a round.
        labels: What each row begins with.
        rate: Floating-point operations a second that the card reaches; None on a CPU.
    """
    by_name = {entry.contender.name: entry for entry in entries}
    largest = by_name[names[-1]]
    chain_seconds, largest_seconds = (statistics.median(entry.rounds) for entry in (by_name[CHAIN], largest))
    small = [by_name[name] for name in names]
    others = [entry for entry in entries if entry not in (by_name[CHAIN], *small)]
    rows = []
    for entry in (by_name[CHAIN], largest, summed(small), *others):
        seconds = statistics.median(entry.rounds) if entry.rounds else None
        row: Row = {
            **labels,
            "contender": entry.contender.name,
            "largest batch, tokens": entry.largest[entry.budget] if entry.first else None,
            "tokens/s": seconds and float(f"{tokens / seconds:.4g}"),
            "spread": seconds and round((max(entry.rounds) - min(entry.rounds)) / seconds, 2),
            "chain's speed over it": seconds and round(seconds / chain_seconds, 3),
            "chain's time over it": seconds and round(chain_seconds / seconds, 3),
            f"{names[-1]}'s speed over it": seconds and round(seconds / largest_seconds, 3),
        }
        if rate is not None:
            work = 2 * entry.contender.parameters * tokens
            row["peak above the weights, GiB"] = (
                round(entry.peaks[entry.budget] / GIBI, 2) if entry.peaks else None
            )
            row["share of the bf16 rate"] = seconds and round(work / seconds / rate, 3)
        rows.append(row)
    return rows


def measure_dtype(arguments: argparse.Namespace, dtype: str, rate: float | None) -> list[Row]:
    """Return the rows of all length sets in one dtype; models are built once."""
    levels = levels_until(arguments)
    device = arguments.device
    without = [OPTIONAL[name] for name in arguments.without]
    built = contenders(levels, getattr(torch, dtype), device, without)
    entries = [Entry(contender, kept=contender.prepared) for contender in built]
    check(entries, alone(levels[-1].name), device)
    proteins = [] if all(map(str.isdecimal, arguments.lengths)) else natural_proteins(data_folder(arguments))
    rows = []
    for lengths in arguments.lengths:
        groups = sample(lengths, arguments.tokens, max(arguments.budgets), proteins)
        plans = plans_of(groups, arguments.budgets, device)
        tokens = sum(batch.real for batch in next(iter(plans.values())))
        report_progress(f"Lengths {lengths} in {dtype} make {tokens} tokens; the budgets are {list(plans)}.")
        compete([e for e in entries if e.contender.encode], plans, arguments.rounds, device)
        labels = {"lengths": lengths, "dtype": dtype}
        rows += rows_of(entries, [alone(level.name) for level in levels], tokens, labels, rate)
    return rows


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_model_options(parser, families=(ESM2_LEVELS, ESMC_LEVELS))
    add_data_option(parser)
    add_dtypes_option(parser)
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=["100-500"],
        metavar="LENGTHS",
        help="Sets of lengths, as described above, by default 100-500.",
    )
    add_rounds_option(parser, 3)
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        help="Numbers of tokens in a batch to try, padding counted; the default depends on the device.",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help="About how many tokens a set of lengths has; the default depends on the device.",
    )
    parser.add_argument("--without", nargs="+", default=[], choices=OPTIONAL, help="Contenders to leave out.")
    arguments = parser.parse_args()
    arguments.budgets = arguments.budgets or BUDGETS[arguments.device]
    arguments.tokens = arguments.tokens or TOKENS[arguments.device]
    return arguments


def main() -> None:
    """Measure, and write the result."""
    arguments = read_arguments()
    rate = matrix_rate() if arguments.device == "cuda" else None
    rows = []
    for dtype in arguments.dtype:
        rows += measure_dtype(arguments, dtype, rate)
        gc.collect()
        if arguments.device == "cuda":
            torch.compiler.reset()  # the next dtype starts as this one did
    title = (
        f"Speed of the chain up to {arguments.level}, each at the best of batches of "
        f"{', '.join(map(str, arguments.budgets))} tokens, on {where(arguments)}"
    )
    if rate is not None:
        title += f"; bf16 matrix products: {rate / 1e12:.0f} TFLOP/s"
    write_result(title, rows, environment(), arguments.output)


if __name__ == "__main__":
    main()
