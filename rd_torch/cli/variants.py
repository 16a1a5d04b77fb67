"""The command `rd-torch variants`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from rd_torch.choices import Scoring
from rd_torch.cli.command import Command, option
from rd_torch.cli.mutations import mutation_options, open_rows, wild_type_of
from rd_torch.cli.reading import INCOMPLETE
from rd_torch.cli.shared import (
    absolute_name,
    budget_option,
    device_option,
    dtype_option,
    load_model,
    model_option,
    model_title,
    published_options,
    take_published,
    trust_option,
)

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.variants import AllSingle, VariantTable

TRAINED_ON = 1_022
"""Number of residues of the longest sequences that ESM-2 was trained on."""

SAYINGS = {
    "wild-type": "scores of the wild type as it is; those of several substitutions are added up",
    "masked": "each mutated site is masked by itself; scores of several substitutions are added up",
    "masked-jointly": "all mutated sites of a variant are masked together",
    "pseudo-likelihood": "each site of each variant is masked, one by one",
}


@click.command(cls=Command)
@click.argument("table", required=False, type=click.Path(path_type=Path), metavar="[TABLE]")
@mutation_options
@option(
    "-o",
    "--output",
    group="Scores",
    type=click.Path(path_type=Path),
    help="Table to write, .csv or .tsv: TABLE with a column of scores for each level.",
)
@option(
    "--scoring",
    group="Scores",
    type=click.Choice(get_args(Scoring)),
    default="masked",
    help="Score by one pass over the wild type (wild-type); with each mutated site masked, and several "
    "substitutions added up (masked); with all sites of a variant masked together (masked-jointly); or with "
    "each site of each variant masked (pseudo-likelihood), which takes long.",
)
@option(
    "--level",
    "levels",
    group="Scores",
    metavar="NAME,...|all",
    show_default="the model's largest",
    help="Ask the language models of these levels, or of all. Each has a column of its own.",
)
@option(
    "--window",
    group="Scores",
    type=click.IntRange(min=1),
    metavar="LENGTH",
    show_default="the whole protein",
    help="Show the model only so many residues around what it is asked about.",
)
@option(
    "--heat-map",
    group="Scores",
    type=click.Path(path_type=Path),
    metavar="PICTURE",
    help="Draw the scores of single substitutions, positions by amino acids: .png, .pdf or .svg.",
)
@option(
    "--embeddings",
    group="Embeddings",
    type=click.Path(path_type=Path),
    metavar="STORE",
    help="Embed the variants into this store, .h5 or .parquet.",
)
@option(
    "--pool",
    group="Embeddings",
    default="mean",
    metavar="WAY,...",
    help="What becomes the vector of a variant: the mean of all residues (mean) or of the mutated ones "
    "(sites), or either less that of the wild type (mean-difference, sites-difference). Several are joined.",
)
@option(
    "--width",
    group="Embeddings",
    type=int,
    metavar="K",
    show_default="all features",
    help="Keep the first K features.",
)
@option(
    "--save-dtype",
    group="Embeddings",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    help="Type of the numbers in the store.",
)
@model_option
@trust_option
@device_option
@dtype_option
@budget_option
@published_options
def variants(
    table: Path | None,
    fasta: Path | None,
    record: str | None,
    sequence: str | None,
    output: Path | None,
    embeddings: Path | None,
    **options: Any,
) -> None:
    """Score and embed variants of a protein.

    \b
      rd-torch variants assay.csv --wild-type protein.fasta -o scores.csv
      rd-torch variants assay.csv --wild-type protein.fasta -o scores.csv --level all --offset 23
      rd-torch variants --all-single --sequence MKTAYIAKQR -o scores.csv --heat-map map.png
      rd-torch variants assay.csv --wild-type protein.fasta --embeddings variants.h5 --pool sites-difference

    TABLE is a table with a column of variants: ProteinGym's mutant, MaveDB's hgvs_pro, or any other that
    --mutation-column names. A variant is written A24G or p.Ala24Gly; several substitutions of one variant
    stand behind each other, A24G:L30V or p.[Ala24Gly;Leu30Val]. Or the table has whole mutated sequences.

    A score says how much likelier the language model finds the variant than the wild type, in natural
    logarithms: 0 for the wild type, below 0 for what it would not expect. No labels are used.

    Rows keep their order and their cells. A variant that cannot be scored, such as one whose letter is not
    that of the wild type, a stop, an insertion or a deletion, has an empty cell. OUTPUT.failed.tsv then lists
    such rows with lines and reasons, and the exit status is 3.

    If the command is interrupted, run it again: it continues where it stopped.
    """
    from rd_torch.weights import DEFAULT_MODEL

    rows = open_rows(table, wild_type_of(fasta, record, sequence), options)
    _require_outputs(output, embeddings, options)
    name, published = options.pop("model"), take_published(options)
    named = _levels_of(options.pop("levels"))
    last = None if named in ([], ["all"]) else _largest(named, name or DEFAULT_MODEL, published)
    published["trust_remote_code"] = [*map(absolute_name, options.pop("trusted"))]
    chain = load_model(name or DEFAULT_MODEL, last, options.pop("dtype"), options.pop("device"), **published)
    every = list(chain.config.widths)
    chosen = every if named == ["all"] else named or every[-1:]
    left_out = 0
    if output is not None:
        click.echo(f"Model {model_title(name)}, level {', '.join(chosen)}", err=True)
        left_out += _score(chain, rows, output, chosen, options)
    if embeddings is not None:
        left_out += _embed(chain, rows, embeddings, name or DEFAULT_MODEL, options)
    if left_out:
        raise SystemExit(INCOMPLETE)


def _levels_of(text: str | None) -> list[str]:
    """Return the levels that `--level` names; raise a ValueError for one that comes twice or has no name."""
    named = [] if text is None else [each.strip() for each in text.split(",")]
    if "" in named or len(set(named)) < len(named):
        raise ValueError(f"expected --level as NAME,... with each level once, or as all, got {text!r}")
    return named


def _largest(levels: list[str], model: str, published: dict[str, Any]) -> str:
    """Return the level up to which a model has to be loaded, so that all of these are there."""
    from rd_torch.weights import read_checkpoint

    if len(levels) == 1 or model.startswith("hf:"):
        return levels[-1]
    every = list(read_checkpoint(model, **published).config.widths)
    unknown = [level for level in levels if level not in every]
    return unknown[0] if unknown else max(levels, key=every.index)


def _require_outputs(output: Path | None, embeddings: Path | None, options: dict[str, Any]) -> None:
    """Require something to write, and a place for it.

    Raises:
        ValueError: for nothing to write, and a heat map without scores.
        FileNotFoundError: where the folder of an output does not exist.
    """
    from rd_torch.disk import require_folder

    if output is None and (embeddings is None or options["heat_map"] is not None):
        wanted = "-o with a heat map" if options["heat_map"] else "-o for scores, or --embeddings"
        raise ValueError(
            f"expected {wanted}, got neither" if not embeddings else f"expected {wanted}, got none"
        )
    for path in filter(None, (output, embeddings)):
        require_folder(path)


def _score(
    chain: RDModel, rows: VariantTable | AllSingle, output: Path, levels: list[str], options: dict[str, Any]
) -> int:
    """Write the table of scores; return the number of rows without one."""
    from rd_torch.cli.progress import Bar
    from rd_torch.store import failure_list
    from rd_torch.variants import Request, score_table, view_of

    scoring, window = options["scoring"], options["window"]
    click.echo(f"Scoring {scoring}: {SAYINGS[scoring]}.", err=True)
    _say_length(len(rows.wild_type), window)
    request = Request(levels, scoring, view_of(window), options["tokens_per_batch"])
    with ExitStack() as stack:
        left_out = score_table(
            chain,
            rows,
            output,
            request,
            heat_map=options["heat_map"],
            progress=lambda total: stack.enter_context(Bar("sequence", total)),
        )
    click.echo(f"Wrote the scores to {output}.", err=True)
    if left_out:
        path = failure_list(output)
        click.echo(f"Rows without a score: {left_out:,}. {path} lists them with the reasons.", err=True)
    return left_out


def _say_length(residues: int, window: int | None) -> None:
    """Print what is done with a protein that is longer than what the model sees or was trained on."""
    if window is not None and residues > window:
        click.echo(f"The model sees {window:,} of {residues:,} residues, around each site.", err=True)
    elif residues > TRAINED_ON:
        click.echo(
            f"The model sees all {residues:,} residues at once. ESM-2 was trained on at most {TRAINED_ON:,}; "
            f"--window {TRAINED_ON} shows it only those around each site.",
            err=True,
        )


def _embed(
    chain: RDModel, rows: VariantTable | AllSingle, store: Path, name: str, options: dict[str, Any]
) -> int:
    """Embed the variants; return the number of those that were left out."""
    from rd_torch.cli.progress import Bar
    from rd_torch.store import failure_list
    from rd_torch.variants import Target, embed_table

    target = Target(store, None, options["save_dtype"], name, options["tokens_per_batch"])
    pool, width = options["pool"].replace(",", "+"), options["width"]
    with Bar("residue") as bar:
        failures = embed_table(chain, rows, target, pool=pool, width=width, progress=bar)
    click.echo(f"Wrote the embeddings to {store}.", err=True)
    if failures:
        path = failure_list(store)
        click.echo(
            f"Left out {len(failures):,} of the variants. {path} lists them with the reasons.", err=True
        )
    return len(failures)
