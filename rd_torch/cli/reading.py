"""Options of commands that read proteins, and what is said of those that could not be embedded."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.shared import Command, option

if TYPE_CHECKING:
    from rd_torch.cluster import Records
    from rd_torch.reading import Proteins

proteins_argument = click.argument("proteins", nargs=-1, required=True, metavar="PROTEINS...")
_READING = (
    option(
        "--identifier",
        metavar="RULE",
        help="What is taken of a header as the identifier: word (the first word), header (the whole line), "
        "uniprot (the accession of sp|ACCESSION|NAME), or a regular expression, of which the first group is "
        "taken.  "
        "[default: word; header for .pt]",
    ),
    option(
        "--sequence-column",
        metavar="NAME",
        help="Column of a table that has the sequences.  [default: guessed]",
    ),
    option(
        "--identifier-column",
        metavar="NAME",
        help="Column of a table that has the identifiers.  [default: guessed]",
    ),
)
strict_option = option(
    "--strict",
    is_flag=True,
    help="Stop at the first record that cannot be read, and refuse letters that are no residue instead of "
    "reading them as X.",
)

INCOMPLETE = 3
"""Exit status when some proteins could not be embedded."""


def reading_options(command: Command) -> Command:
    """Adds the options that say how files of proteins are read."""
    return reduce(lambda inner, add: add(inner), reversed(_READING), command)


def take_proteins(sources: tuple[str, ...], options: dict[str, Any]) -> Proteins:
    """The proteins of a command, whose options on reading are taken out of its others.

    Raises:
        ValueError, FileNotFoundError: as `Proteins`; with a cluster, for standard input and pipes.
    """
    from rd_torch.reading import Proteins

    how = {name: options.pop(name) for name in ("identifier", "sequence_column", "identifier_column")}
    proteins = Proteins(*sources, **how)
    if options["cluster"]:
        proteins.require_files()
    return proteins


def records_of(proteins: Proteins, **reading: Any) -> Records:
    """The same proteins as every machine of a cluster reads them."""
    from rd_torch.cluster import Records

    paths = [Path(source).resolve() for source in proteins.sources]
    return Records(paths, identifier=proteins.identifier, columns=proteins.table_columns, **reading)


def list_failures(path: Path, failures: int) -> None:
    """Says that proteins were left out, and ends the command with the status for that.

    Args:
        path: where they are listed.
        failures: how many there are.
    """
    if failures:
        click.echo(f"{failures:,} proteins could not be embedded: {path} says why", err=True)
        raise SystemExit(INCOMPLETE)
