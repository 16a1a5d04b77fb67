"""`rd-torch embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rd_torch.cli.shared import (
    budget_option,
    device_option,
    fasta_argument,
    format_option,
    given,
    load,
    model_option,
    named,
    option,
    output_option,
    plainly,
    published_options,
    require_one,
    save_dtype_option,
    stop_option,
    strict_option,
)

INCOMPLETE = 3
"""Exit status when some proteins could not be embedded."""


@click.command()
@fasta_argument
@output_option
@format_option
@model_option
@option("--width", type=int, metavar="K", help="Keep K features; backbones that they don't need don't run.")
@stop_option
@option(
    "--pool", type=click.Choice(["mean", "none"]), default="mean", help="A vector a protein or a residue."
)
@budget_option
@option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", help="Backbones'."
)
@save_dtype_option
@option("--max-length", type=click.IntRange(min=1), metavar="N", help="Cut longer sequences to N residues.")
@strict_option
@device_option
@published_options
@plainly
def embed(
    fasta: Path,
    output: Path,
    model: str | None,
    width: int | None,
    level: str | None,
    dtype: str,
    device: str | None,
    strict: bool,
    max_length: int | None,
    **options: Any,
) -> None:
    """Embed the proteins of a FASTA file (plain, gzipped or xz), however many they are.

    The output's name tells the format: .h5, one dataset a protein, named by the first word of its
    header ('/' as %2F); .parquet, a folder of tables with a column for what each level adds; .pt, a
    folder as fair-esm's extract.py writes it. Nothing is cut unless --max-length says so.

    Run the same command again after a kill, a full disk or a crash: it goes on where it was. A sequence
    that takes more memory than there is is left out and listed in OUTPUT.failed.tsv, and the exit
    status is 3.

    \b
      rd-torch embed proteins.fasta -o mean.h5
      rd-torch embed proteins.fasta.gz -o residues.h5 --pool none --width 64
      rd-torch embed proteome.fasta -o proteome.parquet --save-dtype float16
    """
    from rd_torch.cli.progress import Progress
    from rd_torch.embedding import embed_to_store
    from rd_torch.sequences import Fasta, normalized_proteins
    from rd_torch.store import format_of
    from rd_torch.store.format import require_folder
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    require_one(width, level)
    require_folder(output)
    format_of(output, options["form"])
    file = Fasta(fasta)
    name, published = model or DEFAULT_MODEL, given(options)
    if width is not None:
        level = read_checkpoint(name, **published).config.levels_for(width)[-1]
    chain = load(name, level, dtype, device, **published)
    width, level = width or chain.embed_dim, list(chain.backbones)[-1]
    click.echo(f"Model {named(model)}, level {level}, width {width}", err=True)
    with Progress(file) as progress:
        failures = embed_to_store(
            chain,
            progress.counted(normalized_proteins(file, strict=strict, max_length=max_length)),
            output,
            name=name,
            width=width,
            progress=progress,
            **options,
        )
    click.echo(f"Embeddings in {output}", err=True)
    if failures:
        click.echo(
            f"{len(failures):,} proteins could not be embedded: {output}.failed.tsv says why", err=True
        )
        raise SystemExit(INCOMPLETE)
