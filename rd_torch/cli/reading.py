"""Options of the commands that read proteins, and the report of records that were left out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.command import add_options, option

if TYPE_CHECKING:
    from rd_torch.cluster import Records
    from rd_torch.reading import Proteins

INCOMPLETE = 3
"""Exit status of a command that left proteins out."""

proteins_argument = click.argument("paths", nargs=-1, required=True, metavar="PROTEINS...")
reading_options = add_options(
    option(
        "--identifier",
        group="Input",
        metavar="RULE",
        show_default="word; header for .pt",
        help="Part of a header that becomes the protein's identifier: its first word (word), the whole "
        "line (header), the accession in sp|ACCESSION|NAME (uniprot), or the first group of a regular "
        "expression.",
    ),
    option(
        "--sequence-column",
        group="Input",
        metavar="NAME",
        show_default="guessed where only one fits",
        help="Column of a table that holds the sequences.",
    ),
    option(
        "--identifier-column",
        group="Input",
        metavar="NAME",
        show_default="guessed where only one fits",
        help="Column of a table that holds the identifiers.",
    ),
)
strict_option = option(
    "--strict",
    group="Input",
    is_flag=True,
    help="Stop at the first record that cannot be read, and at letters that stand for no residue. Otherwise "
    "such records are left out, and such letters are read as X.",
)


def take_proteins(paths: tuple[str, ...], options: dict[str, Any]) -> Proteins:
    """Open the proteins of a command, and take the options on reading out of the command's options.

    Raises:
        ValueError: as `Proteins` does; also for standard input and pipes together with a cluster.
        FileNotFoundError: if there is nothing at a path.
    """
    from rd_torch.reading import Proteins

    rules = {name: options.pop(name) for name in ("identifier", "sequence_column", "identifier_column")}
    proteins = Proteins(*paths, **rules)
    if options.get("cluster"):
        proteins.require_files()
    return proteins


def records_of(proteins: Proteins, **reading: Any) -> Records:
    """Return the same proteins in the form in which every machine of a cluster reads them."""
    from rd_torch.cluster import Records

    paths = [Path(source).resolve() for source in proteins.sources]
    return Records(paths, identifier=proteins.identifier, columns=proteins.table_columns, **reading)


def report_failures(path: Path, failures: int) -> None:
    """Print how many proteins were left out, and end the command with `INCOMPLETE` if there are any.

    Args:
        path: the file that lists them.
        failures: their number.
    """
    if failures:
        click.echo(f"Left out {failures:,} of the proteins. {path} lists them with the reasons.", err=True)
        raise SystemExit(INCOMPLETE)
