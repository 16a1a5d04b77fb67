"""Options that say of which protein variants are, and where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.command import add_options, option

if TYPE_CHECKING:
    from rd_torch.variants import AllSingle, VariantTable

mutation_options = add_options(
    option(
        "--wild-type",
        "fasta",
        group="Wild type",
        metavar="FASTA",
        type=click.Path(path_type=Path),
        help="File with the sequence of the wild type.",
    ),
    option(
        "--record",
        group="Wild type",
        metavar="NAME",
        help="Identifier of the wild type, where the file has several sequences.",
    ),
    option(
        "--sequence", group="Wild type", metavar="LETTERS", help="The sequence itself, in place of a file."
    ),
    option(
        "--all-single",
        group="Variants",
        is_flag=True,
        help="Take all single substitutions by the twenty amino acids, in place of TABLE.",
    ),
    option(
        "--mutation-column",
        group="Variants",
        metavar="NAME",
        show_default="guessed where only one fits",
        help="Column with the variants, such as A24G, A24G:L30V or p.Ala24Gly.",
    ),
    option(
        "--sequence-column",
        group="Variants",
        metavar="NAME",
        show_default="guessed where no column has variants",
        help="Column with whole mutated sequences, which are compared with the wild type.",
    ),
    option(
        "--offset",
        group="Variants",
        type=int,
        default=0,
        metavar="N",
        help="What has to be added to positions in the given wild type to get those of TABLE. If its first "
        "residue is number 24 there, this is 23.",
    ),
    option(
        "--zero-based", group="Variants", is_flag=True, help="Positions of TABLE are counted from 0, not 1."
    ),
)


def wild_type_of(fasta: Path | None, record: str | None, sequence: str | None) -> str:
    """Return the residues of the wild type.

    Raises:
        ValueError: for none or two wild types, a file of several without the name of one, a name that is not
            in the file, and a sequence that cannot be read.
    """
    from rd_torch.reading import Fasta
    from rd_torch.variants import read_wild_type

    if (fasta is None) == (sequence is None):
        raise ValueError(
            f"expected the wild type as --wild-type FASTA or --sequence, got {'both' if fasta else 'none'}"
        )
    if fasta is None and record is not None:
        raise ValueError("expected --record together with --wild-type FASTA, got it with --sequence")
    if fasta is None:
        return read_wild_type(sequence or "")
    found = [each for each in Fasta(fasta) if record in (None, each.identifier)]
    if len(found) != 1:
        wanted = f"called {record}" if record else "in the file of the wild type, or --record with its name"
        raise ValueError(f"expected one sequence {wanted}, got {len(found) or 'none'} in {fasta}")
    return read_wild_type(found[0].sequence)


def open_rows(table: Path | None, wild_type: str, options: dict[str, Any]) -> VariantTable | AllSingle:
    """Open the variants, and take the options on them out of a command's options.

    Raises:
        ValueError: for no variants or two kinds of them, and as `VariantTable` does.
    """
    from rd_torch.variants import AllSingle, VariantTable

    first = options.pop("offset") + (0 if options.pop("zero_based") else 1)
    columns = {name: options.pop(name) for name in ("mutation_column", "sequence_column")}
    if options.pop("all_single") == (table is not None):
        raise ValueError(f"expected TABLE or --all-single, got {'both' if table else 'neither'}")
    if table is None:
        if any(columns.values()):
            raise ValueError("expected a column together with TABLE, got it with --all-single")
        return AllSingle(wild_type, first)
    rows = VariantTable(table, wild_type, first=first, **columns)
    click.echo(f"Reading column {rows.reads!r} of {table}; the first residue is number {first}.", err=True)
    return rows
