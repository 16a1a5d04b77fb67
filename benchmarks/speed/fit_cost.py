"""What do moments and solving add to the forward passes of a fit?

    python -m benchmarks.speed.fit_cost --residues 20000 --output FILE

The script runs `rd_torch.fit` once on natural proteins, with random weights of the published shapes up to
`--level`, and takes the time inside it: of each backbone's forward pass, of each batch's update of the
moments, of solving the stages. They alternate batch by batch, so noise of the machine meets them alike; on
CUDA the clock waits for the device at each end. What is left is everything else: tokenising, packing, picking
the residues, putting the model together. Backbones and linear algebra run once before the clock does.

Forward passes, updates and the rest grow with the residues; solving does not. The last two columns are the
same fit at the paper's size, 1,000 proteins of 400 residues: measured seconds a residue, times 400,000, and
solving as measured.
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from unittest import mock

import torch

import rd_torch
from benchmarks.options import DTYPES, add_data_option, data_folder, new_parser
from benchmarks.proteins import natural_proteins
from benchmarks.result import Row, environment, write_result
from benchmarks.speed.clock import now
from benchmarks.speed.models import add_model_options, levels_until, random_fair, where
from rd_torch import sums
from rd_torch.backbone import tokenize
from rd_torch.levels import ALPHABET

PAPER_RESIDUES = 1000 * 400
FORWARD, UPDATE, SOLVE, REST = "forward passes", "update of the moments", "solving", "everything else"


class Stopwatch:
    """Seconds and numbers of calls by name.

    Args:
        device: `"cpu"` or `"cuda"`, for which the clock waits.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def timed(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        """Return a function that does the same and adds its time under the name."""

        @functools.wraps(function)
        def call(*args: object, **options: object) -> object:
            start = now(self.device)
            result = function(*args, **options)
            self.seconds[name] += now(self.device) - start
            self.calls[name] += 1
            return result

        return call


@contextmanager
def watched(stopwatch: Stopwatch) -> Iterator[None]:
    """Time what `rd_torch.fit` calls: backbones, moments and the solving."""
    parts = (
        (rd_torch.ESM2, "forward", FORWARD),
        (rd_torch.RunningMoments, "update", UPDATE),
        (sums, "solve_chain", SOLVE),
    )
    with ExitStack() as stack:
        for owner, name, part in parts:
            timed = stopwatch.timed(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


def warm_up(backbones: Mapping[str, rd_torch.ESM2], sequence: str, device: str) -> None:
    """Run what the fit will run, once and small."""
    moments = rd_torch.RunningMoments(sum(backbone.embed_dim for backbone in backbones.values()), device)
    moments.update(torch.randn(64, moments.width, device=device))
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64, device=device))
    tokens = tokenize([sequence], ALPHABET).to(device)
    with torch.inference_mode():
        for name, backbone in backbones.items():
            rd_torch.RDModel({name: backbone}, []).eval().encode(tokens)


def measure(arguments: argparse.Namespace, sequences: Sequence[str]) -> list[Row]:
    """Run one fit, and return a row for each of its parts."""
    device = arguments.device
    torch.manual_seed(0)
    backbones = {
        level.name: rd_torch.ESM2.sharing(random_fair(level, device)).to(getattr(torch, arguments.dtype))
        for level in levels_until(arguments)
    }
    warm_up(backbones, sequences[0], device)
    stopwatch = Stopwatch(device)
    with watched(stopwatch):
        start = now(device)
        model = rd_torch.fit(backbones, sequences, tokens_per_batch=arguments.tokens_per_batch)
        total = now(device) - start
    residues = model.config.provenance["fit"]["residues"]
    batches = stopwatch.calls[UPDATE]
    expected = {FORWARD: batches * len(backbones), UPDATE: batches, SOLVE: 1}
    if dict(stopwatch.calls) != expected or residues != sum(map(len, sequences)):
        raise SystemExit(f"expected a fit to make the calls {expected}, got {dict(stopwatch.calls)}")
    seconds = dict(stopwatch.seconds)
    seconds[REST] = total - sum(seconds.values())
    return rows_of(seconds, PAPER_RESIDUES / residues)


def rows_of(seconds: Mapping[str, float], factor: float) -> list[Row]:
    """Return a row for each part, as measured and at the paper's size.

    Args:
        seconds: By part, what was measured.
        factor: How many times as many residues the paper's size has.
    """
    paper = {part: spent * (1 if part == SOLVE else factor) for part, spent in seconds.items()}
    groups: dict[str, tuple[str, ...]] = {part: (part,) for part in (FORWARD, UPDATE, SOLVE, REST)}
    groups["moments and solving together"] = (UPDATE, SOLVE)
    rows = []
    for name, parts in groups.items():
        spent, there = (sum(times[part] for part in parts) for times in (seconds, paper))
        rows.append(
            {
                "part": name,
                "seconds": round(spent, 3),
                "share of the forward passes": round(spent / seconds[FORWARD], 4),
                "seconds at 1,000 x 400 residues": round(there, 1),
                "share there": round(there / paper[FORWARD], 4),
            }
        )
    return rows


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    add_model_options(parser)
    add_data_option(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Type of the backbones, by default %(default)s."
    )
    parser.add_argument(
        "--residues",
        type=int,
        default=20_000,
        help="About how many residues to fit on, by default %(default)s.",
    )
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=8192,
        help="Number of tokens in a batch, by default %(default)s.",
    )
    arguments = parser.parse_args()
    proteins = natural_proteins(data_folder(arguments))
    enough = next(
        (k for k, n in enumerate(accumulate(map(len, proteins)), 1) if n >= arguments.residues), None
    )
    sequences = proteins[:enough]
    title = (
        f"A fit up to {arguments.level} on {len(sequences)} proteins of {sum(map(len, sequences)):,} "
        f"residues, backbones in {arguments.dtype}, on {where(arguments)}"
    )
    write_result(title, measure(arguments, sequences), environment(), arguments.output)


if __name__ == "__main__":
    main()
