"""The command line that the fine-tuning scripts share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.finetuning.problem import Problem
from benchmarks.finetuning.run import APPROACHES
from benchmarks.finetuning.study import Study
from benchmarks.finetuning.summary import constant_row, draw, rows_of
from benchmarks.options import add_data_option, add_model_option, new_parser
from benchmarks.result import environment, write_result

RUNS = """
A run is one approach at one level with one seed. Approaches:

    baseline    A head on features that need no model; in place of embeddings it sees these features.
    frozen      The same head on the chain's embeddings, which are computed once.
    LoRA        The chain with LoRA on q_proj and v_proj (Hu et al., arXiv 2106.09685), and the head.
    full        Everything trains.

LoRA and full begin with the head that the frozen run of their level and seed ended with, so that they gain
nothing which a longer training of the head alone would have given. A run ends when the validation score has
not risen for `--patience` epochs, and is judged by the test proteins at its best epoch. After every epoch its
state is written to `--folder`: the same command goes on from there, and takes finished runs as they are.
"""


def run_study(problem: Problem, description: str | None) -> None:
    """Run the command line of a script.

    Args:
        problem: What the script asks.
        description: Docstring of the script.
    """
    arguments = read_arguments(f"{description}{RUNS}")
    study = Study(problem, arguments)
    runs = study.runs()
    if arguments.plot:
        draw(problem, study.widths(), runs, arguments.plot)
    counts = ", ".join(f"{len(examples):,} {name}" for name, examples in study.sets.items())
    title = f"{problem.title}: {arguments.model}, {arguments.seeds} seeds, proteins {counts}"
    rows = [constant_row(problem, study.sets), *rows_of(problem, study.widths(), runs)]
    write_result(title, rows, environment(), arguments.output)


def read_arguments(description: str) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(description)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--folder", type=Path, help="Folder for the states of the runs, by default one in finetuning/."
    )
    parser.add_argument(
        "--approaches",
        choices=APPROACHES,
        nargs="+",
        default=list(APPROACHES),
        help="Approaches to run, by default all.",
    )
    parser.add_argument("--plot", type=Path, help="File to draw the learning curves in, a PNG.")
    for name, default, text in (
        ("--seeds", 3, "Number of seeds, by default %(default)s."),
        ("--proteins", None, "Number of training proteins, by default all."),
        ("--proteins-valid", None, "Number of validation proteins, by default all."),
        ("--residues", 1022, "Number of residues at which proteins are cut, by default %(default)s."),
        ("--epochs", 30, "Number of epochs at the most where the chain trains, by default %(default)s."),
        ("--epochs-head", 200, "The same where only a head trains, by default %(default)s."),
        ("--patience", 3, "Number of epochs without a better score that end a run, by default %(default)s."),
        ("--tokens-per-batch", 4096, "Number of tokens in a batch of the chain, by default %(default)s."),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    return parser.parse_args()
