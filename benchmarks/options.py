"""The command-line options that several benchmarks share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.result import command
from rd_torch.weights import DEFAULT_MODEL

DTYPES = ("float32", "bfloat16", "float16")
LAYERS = 8
"""Number of layers of a backbone that are taken at the most, unless another is asked for."""


def new_parser(
    description: str | None, output: str = "File to write the result to, as JSON."
) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a script's docstring, and which knows `--output`.

    Args:
        description: The docstring of the script, shown as it is.
        output: The help of `--output`.
    """
    parser = argparse.ArgumentParser(
        prog=command(Path(sys.argv[0])),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help=output)
    return parser


def add_dtypes_option(parser: argparse.ArgumentParser) -> None:
    """Let a parser take one or several types of the weights."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["float32"],
        help="Types of the weights, by default float32.",
    )


def add_rounds_option(parser: argparse.ArgumentParser, default: int) -> None:
    """Let a parser take the number of timed rounds."""
    parser.add_argument(
        "--rounds", type=int, default=default, help="Number of timed rounds, by default %(default)s."
    )


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the folder of the protein data; `data_folder` reads it."""
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("RD_TORCH_DATA"),
        help="Folder of the protein data; by default the one that RD_TORCH_DATA names.",
    )


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Let a parser take a chain, by default the shipped family."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="Folder or Hub id of a chain, or the shipped family, which is the default.",
    )


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the size of the data sets, the layers to try, and where things are kept."""
    parser.add_argument(
        "--variants",
        type=int,
        default=1_000,
        help="Number of variants of a data set at the most, by default %(default)s.",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=LAYERS,
        help="Number of layers of a backbone to take at the most, evenly spread; by default %(default)s.",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("scaling-cache"), help="Folder for what is kept between runs."
    )


def data_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the protein data.

    Raises:
        SystemExit: If neither `--data` nor `RD_TORCH_DATA` names one.
    """
    if arguments.data is None:
        raise SystemExit("expected the folder of the protein data in --data or RD_TORCH_DATA, got none")
    return Path(arguments.data)
