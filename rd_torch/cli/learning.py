"""The commands `rd-torch learn` and `rd-torch predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from rd_torch.choices import HeadName, LearningTask
from rd_torch.cli.command import Command, option
from rd_torch.cli.embedding import parse_pool
from rd_torch.cli.reading import proteins_argument, reading_options, report_failures, take_proteins
from rd_torch.cli.shared import (
    budget_option,
    device_option,
    dtype_option,
    level_option,
    load_model,
    model_option,
    model_title,
    published_options,
    take_published,
)


@click.command(cls=Command)
@click.argument("table", type=click.Path(path_type=Path))
@option(
    "-o",
    "--output",
    group="Output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the predictor to write. Nothing may be there.",
)
@option("--target", group="Labels", required=True, metavar="NAME", help="Column that holds the labels.")
@option(
    "--task",
    group="Labels",
    type=click.Choice(get_args(LearningTask)),
    show_default="regression for numbers, else classification",
    help="What to predict: numbers, one class, or several labels that are joined by ';' in the table.",
)
@option(
    "--per-residue",
    group="Labels",
    is_flag=True,
    help="Predict a label for each residue. The column then holds a letter for each residue, or numbers with "
    "blanks or commas between them; - stands for a residue without a label.",
)
@option(
    "--sequence-column",
    group="Labels",
    metavar="NAME",
    show_default="guessed where only one fits",
    help="Column that holds the sequences.",
)
@option(
    "--split-column",
    group="Labels",
    metavar="NAME",
    show_default="five folds of similar sequences",
    help="Column that says train, valid or test, or the fold of each sequence, as the fold columns of "
    "ProteinGym do. Rows of test do not teach.",
)
@option(
    "--head",
    group="Head",
    type=click.Choice(get_args(HeadName)),
    show_default="ridge for numbers, logistic for classes",
    help="Kind of head: ridge or logistic regression, a network with one hidden layer (mlp), nearest "
    "neighbours (knn), or a Gaussian process (gp) for at most 1,000 numbers.",
)
@option(
    "--widths",
    group="Head",
    metavar="K,...",
    show_default="those of the model's levels",
    help="Widths to choose from.",
)
@option(
    "--pool",
    group="Model",
    multiple=True,
    default=["mean"],
    callback=lambda _, __, ways: parse_pool(ways),
    metavar="WAY,...",
    help="How the vectors of a protein's residues become one, as for rd-torch embed.",
)
@model_option
@level_option
@device_option
@dtype_option
@budget_option
@published_options
def learn(
    table: Path,
    output: Path,
    target: str,
    model: str | None,
    level: str | None,
    widths: str | None,
    device: str | None,
    dtype: str,
    pool: str,
    **options: Any,
) -> None:
    """Learn to predict a column of a table of sequences.

    \b
      rd-torch learn proteins.csv --target Tm -o stability
      rd-torch learn assay.csv --target DMS_score --split-column fold_random_5 -o assay
      rd-torch learn structures.csv --target states --per-residue -o structure
      rd-torch predict new.fasta --predictor stability -o predictions.tsv

    TABLE has a header row and a column of sequences. It may be comma- or tab-separated text, packed or not,
    or Parquet.

    Each sequence is embedded once. A head is fitted at every width. Cross-validation chooses its penalty, and
    the narrowest width that is not worse than the best by more than a standard error. Similar sequences lie
    in one fold: they are grouped by MMseqs2 where it is installed, else by shared words of residues. The
    scores are those of predictions that have seen no label of their fold, not even by a choice.

    The predictor is a folder with the head, a card, and the score at every width as a table and a picture. It
    names the level beyond which no backbone need run.

    If the command is interrupted, run it again: embeddings that are done stay done.
    """
    from rd_torch.cli.progress import Bar
    from rd_torch.learning import learn as learn_table
    from rd_torch.learning import spearman_of, spread_of, table_of
    from rd_torch.weights import DEFAULT_MODEL

    name, published = model or DEFAULT_MODEL, take_published(options)
    chosen = None if widths is None else parse_widths(widths)
    click.echo(f"Model {model_title(model)}", err=True)
    chain = load_model(name, level, dtype, device, **published)
    options |= {"name": name, "loading": published, "widths": chosen}
    if not options["per_residue"]:
        options["pool"] = pool
    with Bar("residue") as bar:
        findings = learn_table(table, target, output, model=chain, progress=bar, **options).findings
    click.echo(table_of(findings), nl=False)
    click.echo(
        f"The width {findings.width:,} is chosen: backbones beyond {findings.level} need not run. The whole "
        f"procedure, with the choice of the width, has a cross-validated {findings.score_name} of "
        f"{findings.score:.3f} ({findings.low:.3f} to {findings.high:.3f}){spearman_of(findings)}. Split: "
        f"{findings.split}.",
        err=True,
    )
    click.echo(spread_of(findings), err=True)
    click.echo(f"Wrote the predictor to {output}.", err=True)


def parse_widths(text: str) -> list[int]:
    """Return the widths that `--widths` lists.

    Raises:
        ValueError: for anything but whole numbers with commas between them.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected --widths as numbers with commas between them, got {text!r}") from error


@click.command(cls=Command)
@proteins_argument
@option(
    "--predictor",
    required=True,
    group="Model",
    type=click.Path(path_type=Path),
    help="Folder that rd-torch learn wrote.",
)
@option(
    "-o",
    "--output",
    required=True,
    group="Output",
    type=click.Path(path_type=Path),
    help="Table to write, with tabs between columns.",
)
@option(
    "--model",
    group="Model",
    metavar="MODEL",
    show_default="the one that the predictor names",
    help="Where the predictor's model is now. Another model is refused.",
)
@reading_options
@device_option
@budget_option
def predict(
    paths: tuple[str, ...],
    predictor: Path,
    output: Path,
    model: str | None,
    device: str | None,
    tokens_per_batch: int | None,
    **options: Any,
) -> None:
    """Predict proteins with a predictor that rd-torch learn wrote.

    \b
      rd-torch predict new.fasta --predictor stability -o predictions.tsv

    PROTEINS are files, folders, or - for standard input, as for rd-torch embed. Only the backbones that the
    predictor needs are loaded and run.

    The table has a row for each protein, or for each residue. A number comes with an interval (low, high)
    that had 90 % of held-out labels, a class with the share of held-out predictions of about the same
    confidence that were right (right).

    A record that cannot be read or embedded is left out. OUTPUT.failed.tsv then lists it, and the exit status
    is 3. If the command is interrupted, run it again: it continues where it stopped.
    """
    from rd_torch.cli.progress import ResidueBar
    from rd_torch.cli.shared import find_device
    from rd_torch.disk import require_folder
    from rd_torch.learning import Learned, predict_to_table
    from rd_torch.store import failure_list

    require_folder(output)
    proteins = take_proteins(paths, options)
    learned = Learned.load(predictor)
    findings = learned.findings
    chain = learned.load_model(model, find_device(device))
    click.echo(f"Model {findings.model}, level {findings.level}, width {findings.width}", err=True)
    with ResidueBar(proteins) as bar:
        failures = predict_to_table(
            learned,
            chain,
            bar.count_read(proteins.entries()),
            output,
            tokens_per_batch=tokens_per_batch,
            progress=bar,
        )
    click.echo(f"Wrote the predictions to {output}.", err=True)
    report_failures(failure_list(output), len(failures))
