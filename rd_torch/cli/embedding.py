"""`rd-torch embed`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.shared import (
    budget_option,
    cluster_options,
    device_option,
    fasta_argument,
    format_option,
    given,
    joined,
    load,
    model_option,
    named,
    on_all_machines,
    option,
    output_option,
    plainly,
    published_options,
    require_one,
    save_dtype_option,
    stop_option,
    strict_option,
)

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.sequences import Fasta

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
@cluster_options
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

    With --cluster the same job runs on all machines of a Ray cluster, for .parquet and .pt; they must see
    FASTA file, model and output under the same paths.

    \b
      rd-torch embed proteins.fasta -o mean.h5
      rd-torch embed proteins.fasta.gz -o residues.h5 --pool none --width 64
      rd-torch embed proteome.fasta -o proteome.parquet --save-dtype float16
      rd-torch embed proteome.fasta -o proteome.parquet --cluster 10.0.0.1:6379
    """
    from rd_torch.cli.progress import Progress
    from rd_torch.sequences import Fasta
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
    if options["cluster"]:
        from rd_torch.cluster import require_parts

        require_parts(output, options["form"], options["pool"])
    workers = joined(options, device)
    chain = load(name, level, dtype, "cpu" if workers else device, **published)
    width, level = width or chain.embed_dim, list(chain.backbones)[-1]
    click.echo(f"Model {named(model)}, level {level}, width {width}", err=True)
    with Progress(file) as progress:
        options |= {"name": name, "width": width, "progress": progress}
        reading = {"strict": strict, "max_length": max_length}
        if workers:
            again = partial(load, on_all_machines(name), level, dtype, **published)
            failures = _on_cluster(chain, again, file, output, reading, workers=workers, **options)
        else:
            failures = _here(chain, file, output, reading, **options)
    click.echo(f"Embeddings in {output}", err=True)
    if failures:
        click.echo(
            f"{len(failures):,} proteins could not be embedded: {output}.failed.tsv says why", err=True
        )
        raise SystemExit(INCOMPLETE)


def _here(chain: RDModel, file: Fasta, output: Path, reading: dict[str, Any], **options: Any) -> Any:
    """Embeds in this process."""
    from rd_torch.embedding import embed_to_store
    from rd_torch.sequences import normalized_proteins

    proteins = options["progress"].counted(normalized_proteins(file, **reading))
    return embed_to_store(chain, proteins, output, **options)


def _on_cluster(
    chain: RDModel, again: Any, file: Fasta, output: Path, reading: dict[str, Any], **options: Any
) -> Any:
    """Embeds on a cluster; `again` loads the chain in every worker."""
    from rd_torch.cluster import Records, embed_to_store

    return embed_to_store(chain, again, Records(file.path.resolve(), **reading), output, **options)
