"""`rd-torch combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rd_torch.cli.shared import (
    by_level,
    format_option,
    given,
    model_option,
    named,
    option,
    output_option,
    plainly,
    published_options,
    require_one,
    save_dtype_option,
    stop_option,
)


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="LEVEL=FILE...")
@output_option
@format_option
@model_option
@option("--width", type=int, metavar="K", help="Keep K features; files that they don't need may be left out.")
@stop_option
@save_dtype_option
@published_options
@plainly
def combine(
    files: tuple[str, ...],
    output: Path,
    model: str | None,
    width: int | None,
    level: str | None,
    **options: Any,
) -> None:
    """Nest ESM-2 embeddings that you already have; no backbone runs, or is even loaded.

    Each FILE holds the raw final embeddings of one backbone, all averaged over residues or all residue by
    residue: one of ours, HDF5 with a dataset a protein, or a folder of fair-esm's .pt. The levels are the
    model's first ones. Records are matched by identifier and keep the first file's order.

    Run the same command again after a kill, a full disk or a crash: it goes on where it was.

    \b
      rd-torch combine --model my-chain 8M=8M.h5 35M=35M.h5 -o nested.h5
      rd-torch combine --model singhlab/plm_reverse_distillation --level 35M \\
          8M=8M.h5 35M=35M.h5 -o nested.parquet
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
    inputs = by_level(files, "files as LEVEL=FILE")
    nesting = Nesting.from_pretrained(model or DEFAULT_MODEL, level, **given(options))
    width = width if level is None else nesting.config.widths[level]
    levels = nesting.config.first_levels(inputs, width)
    click.echo(f"Model {named(model)}, levels {', '.join(levels)}", err=True)
    with open_store(next(file for name, file in inputs.items() if name in levels)) as first:
        records = len(first)
    with Bar("record", records) as bar:
        combine_stores(nesting, inputs, output, width=width, progress=bar, **options)
    click.echo(f"Embeddings in {output}", err=True)
