"""The command `rd-torch embed`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from rd_torch.cli.command import Command, option
from rd_torch.cli.reading import (
    proteins_argument,
    reading_options,
    records_of,
    strict_option,
    take_proteins,
)
from rd_torch.cli.shared import (
    absolute_name,
    budget_option,
    device_option,
    dtype_option,
    format_option,
    load_model,
    model_option,
    model_title,
    output_option,
    published_options,
    require_one,
    save_dtype_option,
    take_published,
    trust_option,
    until_option,
)
from rd_torch.cli.sharing import (
    cluster_options,
    join_cluster,
    report_done,
    run_on_devices,
    sharing_options,
    take_share,
)

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.reading import Proteins

PIPED = "The proteins come from a pipe. If this is interrupted, pipe the same ones in again."


@click.command(cls=Command)
@proteins_argument
@output_option
@option(
    "--pool",
    group="Output",
    multiple=True,
    default=["mean"],
    callback=lambda _, __, ways: parse_pool(ways),
    metavar="WAY,...",
    help="How the vectors of a protein's residues become one: mean, max, std (standard deviation), or cls, "
    "which takes the vector of <cls>. Several ways are put one after the other. none keeps a vector for each "
    "residue. rd-torch combine takes only mean and none.",
)
@format_option
@save_dtype_option
@model_option
@option(
    "--width",
    group="Model",
    type=int,
    metavar="K",
    show_default="all features",
    help="Keep the first K features. Backbones beyond them do not run.",
)
@until_option
@trust_option
@option(
    "--windows",
    group="Model",
    metavar="LENGTH[,OVERLAP]",
    show_default="sequences stay whole",
    help="Embed a sequence of more than LENGTH residues in overlapping pieces of that length, and blend "
    "these. Pieces overlap by OVERLAP residues, by default a quarter of LENGTH.",
)
@option(
    "--max-length",
    group="Input",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="nothing is cut",
    help="Cut longer sequences to their first N residues.",
)
@strict_option
@reading_options
@device_option
@dtype_option
@budget_option
@sharing_options
@cluster_options
@published_options
def embed(
    paths: tuple[str, ...],
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
    """Embed the proteins of FASTA files and tables.

    \b
      rd-torch embed proteins.fasta -o mean.h5
      rd-torch embed proteins.fasta.gz -o residues.h5 --pool none --width 64
      zcat part*.fasta.gz | rd-torch embed - -o mean.h5
      rd-torch embed proteome.fasta -o proteome.parquet --save-dtype float16
      rd-torch embed proteome.fasta -o proteome.parquet --cluster 10.0.0.1:6379

    PROTEINS are files, folders, or - for standard input, as many as you like. Each file may be FASTA, comma-
    or tab-separated text, or Parquet, and may be packed by gzip, xz, bzip2 or zstd. The content of a file
    tells what it is, not its name.

    The output's name chooses the format. A name in .h5 gives an HDF5 file with a dataset for each protein,
    called by its identifier ('/' becomes %2F). A name in .parquet gives a folder of tables with a column for
    what each level adds. A name in .pt gives a folder of files as fair-esm's extract.py writes them, called
    by whole headers.

    A record that cannot be read without doubt is left out, and so is a sequence that needs more memory than
    there is, or more tokens than the model has positions for. The others are embedded. OUTPUT.failed.tsv then
    lists what was left out, with lines and reasons, and the exit status is 3.

    If the command is interrupted, run it again: it continues where it stopped. It reads the proteins again to
    compare them with those of the first run. If they came from a pipe, pipe the same ones in again.

    ESM-2 was trained on at most 1,022 residues, and runs on more. Proteins several times as long take much
    memory. For these --windows 1022 is worth trying, but it changes their embeddings.

    Several processes or machines can share a job. Give them the same command, but --shard 1/16 to the first,
    --shard 2/16 to the second, and so on, in any order and at any time. All must see the same files and
    output. If a shard dies, run it again. In a Slurm array and under torchrun, give --shard auto to all.

    With --cluster the job runs on all machines of a Ray cluster, if the output is .parquet or .pt. All must
    see the files, the model and the output under the same paths.
    """
    from rd_torch.cli.progress import ResidueBar
    from rd_torch.disk import require_folder
    from rd_torch.store import format_of
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    require_one(width, level)
    require_folder(output)
    format_of(output, options["form"])
    on_several = options["devices"] is not None
    shard, device = take_share(options, device)
    proteins = take_proteins(paths, options)
    if on_several:
        proteins.require_files()
        run_on_devices(_call_embed, click.get_current_context().params)
        return
    options["windows"] = parse_windows(windows)
    name, published = model or DEFAULT_MODEL, take_published(options)
    trusting = published | {"trust_remote_code": [*map(absolute_name, options.pop("trusted"))]}
    if width is not None and not name.startswith("hf:"):
        level = read_checkpoint(name, **published).config.levels_for(width)[-1]
    if options["cluster"]:
        from rd_torch.cluster import require_parts

        require_parts(output, options["form"], options["pool"])
    workers = join_cluster(options, device)
    chain = load_model(name, level, dtype, "cpu" if workers else device, **trusting)
    width, level = width or chain.embed_dim, chain.config.levels[-1].name
    click.echo(f"Model {model_title(model)}, level {level}, width {width}", err=True)
    with ResidueBar(proteins) as bar:
        options |= {"name": name, "width": width, "progress": bar}
        reading = {"strict": strict, "max_length": max_length}
        if proteins.is_read_once:
            click.echo(PIPED, err=True)
        if workers:
            load = partial(load_model, absolute_name(name), level, dtype, **trusting)
            failures = _embed_on_cluster(chain, load, proteins, output, reading, workers=workers, **options)
        else:
            failures = _embed_here(chain, proteins, output, reading, shard=shard, **options)
    report_done(output, len(failures), shard)


def _call_embed(**parameters: Any) -> None:
    """Run the command in another process, which can find this function by its name."""
    cast(Any, embed.callback)(**parameters)


def parse_pool(ways: tuple[str, ...]) -> str:
    """Return the pooling as stores name it, from `--pool` given once or several times.

    Raises:
        click.BadParameter: for a way that does not exist, or one that comes twice.
    """
    from rd_torch.pooling import pool_name

    try:
        return pool_name("+".join(ways).replace(",", "+"))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def parse_windows(text: str | None) -> tuple[int, int] | None:
    """Return the length and the overlap that `--windows` gives, in residues.

    Raises:
        ValueError: for anything but one or two whole numbers, and for windows that cannot be.
    """
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


def _embed_here(
    chain: RDModel, proteins: Proteins, output: Path, reading: dict[str, Any], **options: Any
) -> Any:
    """Embed in this process; return the records that were left out."""
    from rd_torch.embedding import embed_to_store
    from rd_torch.store import format_of

    rule = format_of(output, options["form"]).identifier
    entries = options["progress"].count_read(proteins.entries(rule))
    return embed_to_store(chain, entries, output, **reading, **options)


def _embed_on_cluster(
    chain: RDModel, load: Any, proteins: Proteins, output: Path, reading: dict[str, Any], **options: Any
) -> Any:
    """Embed on a cluster, where every worker calls `load`; return the records that were left out."""
    from rd_torch.cluster import embed_to_store

    return embed_to_store(chain, load, records_of(proteins, **reading), output, **options)
