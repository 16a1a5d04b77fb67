"""`rd-torch plot`."""

from __future__ import annotations

from pathlib import Path

import click

from rd_torch.cli.shared import option, plainly


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".png, .pdf or .svg.")
@option("--width", type=int, metavar="K", help="Features of the narrow map.  [default: the first level's]")
@plainly
def plot(store: Path, output: Path, width: int | None) -> None:
    """Draw an embedding file or folder: a map of its proteins, norms and explained variance.

    Of more than 5,000 records an evenly spread sample is drawn; residues are averaged by protein.

    \b
      rd-torch plot mean.h5 -o mean.png
      rd-torch plot residues.h5 -o residues.pdf --width 64
    """
    from rd_torch.plotting import plot_store

    plot_store(store, output, width=width)
    click.echo(f"Picture in {output}", err=True)
