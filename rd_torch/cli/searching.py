"""The commands `rd-torch index` and `rd-torch search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from rd_torch.cli.command import Command, option
from rd_torch.cli.reading import proteins_argument, reading_options, report_failures, take_proteins
from rd_torch.cli.shared import budget_option, device_option, find_device, load_model

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.searching import Index, IndexConfig, Report

RELIABLE: Final = 0.5
"""Reliability below which no label is given, unless another one is asked for."""

ENOUGH: Final = 0.99
"""Share of the nearest proteins above which nobody needs to be told how to find more."""


@click.command(cls=Command)
@click.argument("stores", nargs=-1, required=True, metavar="STORES...", type=click.Path(path_type=Path))
@option(
    "-o",
    "--output",
    group="Output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write, for example proteome.index.",
)
@option(
    "--add",
    group="Output",
    is_flag=True,
    help="Add the proteins to the index that is at OUTPUT already. The mean that similarities are taken from "
    "stays what it was.",
)
@option(
    "--width",
    group="Model",
    type=int,
    metavar="K",
    show_default="width of the first level",
    help="Number of first features that the first stage of a search compares. More features take more "
    "memory, and find more.",
)
def index(stores: tuple[Path, ...], output: Path, add: bool, width: int | None) -> None:
    """Index the proteins of embedding files for rd-torch search.

    \b
      rd-torch embed proteome.fasta -o proteome.parquet
      rd-torch index proteome.parquet -o proteome.index
      rd-torch index more.parquet -o proteome.index --add

    STORES are files or folders that rd-torch embed wrote with one model and one way to pool. They stay where
    they are, because a search reads the best candidates' whole vectors from them.

    Up to a million proteins, a search compares each query with every one of them. Beyond, proteins lie in
    clusters, and a search looks at the nearest clusters alone.
    """
    from rd_torch.searching import add_to_index, build_index

    if add:
        if width is not None:
            raise ValueError("expected --width when an index is made, got it with --add")
        for store in stores:
            made = add_to_index(output, store)
            made.close()
    else:
        made = build_index(stores, output, width=width)
        made.close()
    click.echo(f"Indexed {len(made):,} proteins in {output}.", err=True)
    click.echo(_describe_recall(made.config), err=True)


def _describe_recall(config: IndexConfig) -> str:
    """Say in sentences how many of the nearest proteins a search finds, and what finds more."""
    width, recall = config.facts.width, config.recall or 0.0
    said = (
        f"The first stage compares {config.first_width} features, and hands on {recall:.0%} of the ten "
        f"nearest by all {width} among 300 candidates."
    )
    wider = next((each for each in config.facts.widths if each > config.first_width), None)
    return said if recall > ENOUGH or wider is None else f"{said} An index of --width {wider} finds more."


@click.command(cls=Command)
@proteins_argument
@click.argument("index", metavar="INDEX", type=click.Path(path_type=Path))
@option(
    "-o",
    "--output",
    group="Output",
    required=True,
    type=click.Path(path_type=Path),
    help="Table to write: .tsv with a header row, or .jsonl with an object in each line.",
)
@option(
    "--format",
    "columns",
    group="Output",
    metavar="COLUMN,...",
    show_default="query,target,rank,similarity,first_similarity",
    help="Columns of the table of hits. There are query_length and target_length, too, in residues.",
)
@option("-k", "k", group="Search", type=click.IntRange(min=1), default=10, help="Hits for each query.")
@option(
    "--candidates",
    group="Search",
    type=click.IntRange(min=1),
    default=300,
    help="Proteins that the first stage hands to the second.",
)
@option(
    "--first-stage-only",
    group="Search",
    is_flag=True,
    help="Compare the first features alone. Larger backbones do not run then.",
)
@option(
    "--labels",
    "table",
    group="Labels",
    type=click.Path(path_type=Path),
    help="Table of labels of indexed proteins, identifiers in its first column. Then only these proteins are "
    "searched, and the output has the labels of each query.",
)
@option(
    "--label-column",
    group="Labels",
    metavar="NAME",
    show_default="the second of two",
    help="Column of the labels.",
)
@option(
    "--reliability",
    "least",
    group="Labels",
    type=click.FloatRange(0, 1),
    show_default="0.5",
    help="Give no label that is less reliable: the share of labelled proteins as near as this that have a "
    "label in common, if half of the queries have no relative among them.",
)
@option(
    "--model",
    group="Model",
    metavar="MODEL",
    show_default="the one that the index names",
    help="Where the model of the index is now. Another model is refused.",
)
@reading_options
@device_option
@budget_option
def search(
    paths: tuple[str, ...],
    index: Path,
    output: Path,
    table: Path | None,
    label_column: str | None,
    least: float | None,
    **options: Any,
) -> None:
    """Find proteins that are near others by their embeddings.

    \b
      rd-torch search queries.fasta proteome.index -o hits.tsv
      rd-torch search queries.fasta proteome.index -o hits.jsonl --first-stage-only
      rd-torch search queries.fasta proteome.index -o labels.tsv --labels families.tsv

    INDEX is a folder that rd-torch index wrote. The queries are embedded by its model on the way. A first
    stage compares their first features with those of all indexed proteins, and a second one compares the
    whole vectors of the best candidates. Similarities are cosines, from -1 to 1, of distances from the mean
    of the indexed proteins.

    With --labels a query takes the labels of the proteins near it, each with its reliability, which the
    labelled proteins tell of each other. Where nothing is near enough, the label is empty.

    If the command is interrupted, run it again: it continues where it stopped.
    """
    from rd_torch.cli.progress import ResidueBar
    from rd_torch.searching import columns_of, open_index, read_labels, search_to_file
    from rd_torch.store import failure_list

    if table is not None and options["columns"] is not None:
        raise ValueError(
            "expected --format for a table of hits, got it with --labels, whose columns are fixed"
        )
    for name, value in (("--label-column", label_column), ("--reliability", least)):
        if table is None and value is not None:
            raise ValueError(f"expected {name} with --labels, got it without")
    least = RELIABLE if least is None else least
    columns = columns_of(options.pop("columns"))
    labels = None if table is None else read_labels(table, label_column)
    model, device = options.pop("model"), options.pop("device")
    proteins = take_proteins(paths, options)
    find_device(device)
    with open_index(index) as opened, ResidueBar(proteins) as bar:
        chain = _load_for(opened, model, device, options["first_stage_only"])
        report = search_to_file(
            chain,
            bar.count_read(proteins.entries("word")),
            opened,
            output,
            columns=columns,
            labels=labels,
            least=least,
            progress=bar,
            **options,
        )
    if labels:
        click.echo(_describe_nearness(report, least), err=True)
    click.echo(f"Wrote {'the labels' if labels else 'the hits'} to {output}.", err=True)
    report_failures(failure_list(output), len(report.failures))


def _describe_nearness(report: Report, least: float) -> str:
    """Say in sentences what counts as near, and how often that errs."""
    if report.threshold == float("inf"):
        return f"No protein is near: at no similarity are labels {least:.0%} reliable."
    return (
        f"Proteins are near from a similarity of {report.threshold:.3f} on: there, labels are {least:.0%} "
        f"reliable. Of queries for which no label is right, about {report.strangers:.1%} get one."
    )


def _load_for(opened: Index, name: str | None, device: str | None, first_alone: bool) -> RDModel:
    """Load the model of an index, or the part of it that suffices for the first stage."""
    facts = opened.config.facts
    level = opened.config.first_level if first_alone and facts.level_fingerprints else facts.levels[-1]
    name = name or facts.model
    if not name:
        raise ValueError(f"expected --model, because {opened.path} does not name its model, got none")
    click.echo(f"Model {name}, level {level}", err=True)
    return load_model(name, level, facts.backbone_dtype, device)
