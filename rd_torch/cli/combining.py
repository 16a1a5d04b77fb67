"""The command `rd-torch combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rd_torch.cli.command import Command, option
from rd_torch.cli.shared import (
    format_option,
    model_option,
    model_title,
    output_option,
    published_options,
    require_one,
    save_dtype_option,
    split_by_level,
    take_published,
    until_option,
)


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, metavar="LEVEL=FILE...")
@output_option
@format_option
@save_dtype_option
@model_option
@option(
    "--width",
    group="Model",
    type=int,
    metavar="K",
    show_default="all features of the files' levels",
    help="Keep the first K features. Files of levels beyond them are not needed.",
)
@until_option
@published_options
def combine(
    files: tuple[str, ...],
    output: Path,
    model: str | None,
    width: int | None,
    level: str | None,
    **options: Any,
) -> None:
    """Nest embeddings that you already have.

    \b
      rd-torch combine --model my-chain 8M=8M.h5 35M=35M.h5 -o nested.h5
      rd-torch combine --model singhlab/plm_reverse_distillation --level 35M \\
          8M=8M.h5 35M=35M.h5 -o nested.parquet

    Each LEVEL=FILE gives the final embeddings of one backbone, as its own model computes them. FILE is an
    output of rd-torch, an HDF5 file with a dataset for each protein, or a folder of fair-esm's .pt files. All
    files hold one vector for each protein, the mean over its residues, or all hold one vector for each
    residue. The levels are the first ones of the model, without a gap.

    Proteins are matched by their identifiers, and stay in the order of the first file. Only the maps of the
    model are loaded, not its backbones.

    If the command is interrupted, run it again: it continues where it stopped.
    """
    from rd_torch.cli.progress import Bar
    from rd_torch.combining import combine_stores
    from rd_torch.disk import require_folder
    from rd_torch.nesting import Nesting
    from rd_torch.store import format_of, open_store
    from rd_torch.weights import DEFAULT_MODEL

    require_one(width, level)
    require_folder(output)
    format_of(output, options["form"])
    inputs = split_by_level(files, "files as LEVEL=FILE")
    nesting = Nesting.from_pretrained(model or DEFAULT_MODEL, level, **take_published(options))
    width = width if level is None else nesting.config.widths[level]
    levels = nesting.config.first_levels(inputs, width)
    click.echo(f"Model {model_title(model)}, levels {', '.join(levels)}", err=True)
    with open_store(next(file for name, file in inputs.items() if name in levels)) as first:
        records = len(first)
    with Bar("record", records) as bar:
        combine_stores(nesting, inputs, output, width=width, progress=bar, **options)
    click.echo(f"Wrote the embeddings to {output}.", err=True)
