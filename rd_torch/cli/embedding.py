"""`rd-torch embed`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from rd_torch.cli.reading import (
    proteins_argument,
    reading_options,
    records_of,
    strict_option,
    take_proteins,
)
from rd_torch.cli.shared import (
    budget_option,
    cluster_options,
    device_option,
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
)
from rd_torch.cli.sharing import on_devices, say_done, sharing_options, take_share

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.reading import Proteins


@click.command()
@proteins_argument
@output_option
@format_option
@model_option
@option("--width", type=int, metavar="K", help="Keep K features; backbones that they don't need don't run.")
@stop_option
@option(
    "--pool",
    multiple=True,
    default=["mean"],
    callback=lambda _, __, ways: named_way(ways),
    metavar="WAY",
    help="Pool residues by mean, max or std, or take cls; several, as mean,max, stand one behind the other. "
    "none keeps a vector a residue. Only means can be nested later, by combine.",
)
@budget_option
@option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", help="Backbones'."
)
@save_dtype_option
@option("--max-length", type=click.IntRange(min=1), metavar="N", help="Cut longer sequences to N residues.")
@option(
    "--windows",
    metavar="LENGTH[,OVERLAP]",
    help="Embed a longer sequence in windows of LENGTH residues and blend them where they overlap, instead "
    "of as a whole; OVERLAP is a quarter of LENGTH unless it is given.  [default: sequences stay whole]",
)
@reading_options
@strict_option
@device_option
@sharing_options
@cluster_options
@published_options
@plainly
def embed(
    proteins: tuple[str, ...],
    output: Path,
    model: str | None,
    width: int | None,
    level: str | None,
    dtype: str,
    device: str | None,
    strict: bool,
    max_length: int | None,
    windows: str | None,
    **options: Any,
) -> None:
    """Embed the proteins of FASTA files and tables, however many they are.

    PROTEINS are files, folders, or - for standard input. Each file may be FASTA, comma- or tab-separated text
    or Parquet, and packed by gzip, xz, bzip2 or zstd: its content tells, not its name.

    The output's name tells the format: .h5, one dataset a protein, named by its identifier ('/' as %2F);
    .parquet, a folder of tables with a column for what each level adds; .pt, a folder as fair-esm's
    extract.py writes it, named by whole headers. Nothing is cut unless --max-length says so.

    A record that cannot be read without doubt, and a sequence that takes more memory than there is, is left
    out and listed with its line and the reason in OUTPUT.failed.tsv; the rest is embedded, and the exit
    status is 3.

    Run the same command again after a kill, a full disk or a crash: it goes on where it was. It reads the
    proteins again to compare them, so pipe the same ones in again where they came from a pipe.

    ESM-2 was trained on 1,022 residues and runs beyond. --windows 1022 is worth trying for proteins several
    times as long, which also take much memory; it changes their embeddings.

    Several machines, or processes, share a job by --shard 1/16, --shard 2/16, ... and otherwise the same
    options, in any order and at any time; a shard that dies is run again. They must see the same files and
    output. In a Slurm array and under torchrun all of them are called with --shard auto.

    With --cluster the same job runs on all machines of a Ray cluster, for .parquet and .pt; they must see
    files, model and output under the same paths.

    \b
      rd-torch embed proteins.fasta -o mean.h5
      zcat part*.fasta.gz | rd-torch embed - -o mean.h5
      rd-torch embed proteins.fasta.gz -o residues.h5 --pool none --width 64
      rd-torch embed proteome.fasta -o proteome.parquet --save-dtype float16
      rd-torch embed proteome.fasta -o proteome.parquet --cluster 10.0.0.1:6379
    """
    from rd_torch.cli.progress import Progress
    from rd_torch.disk import require_folder
    from rd_torch.store import format_of
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    require_one(width, level)
    require_folder(output)
    format_of(output, options["form"])
    several = options["devices"] is not None
    options["shard"], device = take_share(options, device)
    file = take_proteins(proteins, options)
    if several:
        file.require_files()
        on_devices(_embed, click.get_current_context().params)
        return
    options["windows"] = _pieces(windows)
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
        if file.is_read_once:
            click.echo(
                "Read once, from a pipe: to go on after a kill, pipe the same proteins in again", err=True
            )
        if workers:
            again = partial(load, on_all_machines(name), level, dtype, **published)
            failures = _on_cluster(chain, again, file, output, reading, workers=workers, **options)
        else:
            failures = _here(chain, file, output, reading, **options)
    say_done(output, len(failures), options["shard"])


def _embed(**parameters: Any) -> None:
    """The command in another process."""
    cast(Any, embed.callback)(**parameters)


def named_way(ways: tuple[str, ...]) -> str:
    """What `--pool` says, given once or several times."""
    from rd_torch.pooling import pool_name

    try:
        return pool_name("+".join(ways).replace(",", "+"))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _pieces(text: str | None) -> tuple[int, int] | None:
    """The numbers of `--windows`."""
    from rd_torch.pieces import Pieces

    if text is None:
        return None
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected --windows as LENGTH or LENGTH,OVERLAP, got {text!r}") from error
    if len(numbers) > 2:
        raise ValueError(f"expected --windows as LENGTH or LENGTH,OVERLAP, got {text!r}")
    return Pieces.of(numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1]))


def _here(chain: RDModel, file: Proteins, output: Path, reading: dict[str, Any], **options: Any) -> Any:
    """Embeds in this process."""
    from rd_torch.embedding import embed_to_store
    from rd_torch.store import format_of

    rule = format_of(output, options["form"]).identifier
    entries = options["progress"].counted(file.entries(rule))
    return embed_to_store(chain, entries, output, **reading, **options)


def _on_cluster(
    chain: RDModel, again: Any, file: Proteins, output: Path, reading: dict[str, Any], **options: Any
) -> Any:
    """Embeds on a cluster; `again` loads the chain in every worker."""
    from rd_torch.cluster import embed_to_store

    return embed_to_store(chain, again, records_of(file, **reading), output, **options)
