"""The command `rd-torch plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from rd_torch.choices import Scale
from rd_torch.cli.command import Command, option


@click.command(cls=Command)
@click.argument("store", type=click.Path(path_type=Path))
@option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Picture to write. Its name ends in .png, .pdf or .svg.",
)
@option(
    "--width",
    type=int,
    metavar="K",
    show_default="width of the first level",
    help="Number of features in the narrow map, which stands beside the map of all features.",
)
@option(
    "--scale",
    type=click.Choice(get_args(Scale)),
    default="none",
    help="Divide each feature in the maps by its standard deviation (feature), or the features that one "
    "level adds by the root of their mean variance (block), so that added features, which vary less, show.",
)
def plot(store: Path, output: Path, width: int | None, scale: Any) -> None:
    """Draw the embeddings in a file: maps, norms and variance.

    \b
      rd-torch plot mean.h5 -o mean.png
      rd-torch plot residues.h5 -o residues.pdf --width 64

    STORE is a file or folder of embeddings, for example one that rd-torch embed wrote. If it holds more than
    5,000 records, the picture shows an evenly spread sample of them. If it holds a vector for each residue,
    each protein is shown by the mean of its residues.
    """
    from rd_torch.plotting import plot_store

    plot_store(store, output, width=width, scale=scale)
    click.echo(f"Wrote the picture to {output}.", err=True)
