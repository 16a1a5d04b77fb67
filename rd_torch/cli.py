"""`rd-torch`: arguments and printing, nothing else.

Everything heavy is imported inside the commands, so that `--help` comes at once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rd_torch.config import RDConfig
    from rd_torch.model import RDModel
    from rd_torch.sequences import Protein

Command = Callable[..., None]


def _plainly(command: Command) -> Command:
    """Turns errors of bad input into one line, and warnings likewise."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            click.echo(f"Warning: {message}", err=True)

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            try:
                command(**arguments)
            except (ValueError, OSError) as error:
                raise click.ClickException(str(error)) from error

    return run


option = partial(click.option, show_default=True)
fasta_argument = click.argument("fasta", type=click.Path(path_type=Path))
budget_option = option(
    "--tokens-per-batch",
    type=click.IntRange(min=1),
    default=8192,
    metavar="N",
    help="Tokens a batch holds at most: lower it when memory runs out.",
)
strict_option = option("--strict", is_flag=True, help="Refuse letters that are no residue, don't read X.")
device_option = option("--device", help="cpu, cuda, cuda:1, mps, ...  [default: cuda where there is one]")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  rd-torch embed proteins.fasta -o embeddings.h5",
)
@click.version_option(package_name="rd_torch")
def main() -> None:
    """Reverse-distilled ESM-2 embeddings.

    The first features of the large model's embedding are the small models' embeddings: embed once,
    cut later.
    """


@main.command()
@fasta_argument
@option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="HDF5 file.")
@option("--model", metavar="MODEL", help="Checkpoint folder or Hub id.  [default: the shipped family]")
@option("--width", type=int, metavar="K", help="Keep K features; backbones that they don't need don't run.")
@option("--level", metavar="NAME", help="Stop at this level, instead of --width.")
@option(
    "--pool", type=click.Choice(["mean", "none"]), default="mean", help="A vector a protein or a residue."
)
@budget_option
@option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", help="Backbones'."
)
@option(
    "--save-dtype", type=click.Choice(["float32", "float16", "float64"]), default="float32", help="File's."
)
@option("--max-length", type=click.IntRange(min=1), metavar="N", help="Cut longer sequences to N residues.")
@strict_option
@device_option
@_plainly
def embed(
    fasta: Path,
    output: Path,
    model: str | None,
    width: int | None,
    level: str | None,
    dtype: str,
    device: str | None,
    strict: bool,
    max_length: int | None,
    **options: Any,
) -> None:
    """Embed the proteins of a FASTA file (plain, gzipped or xz) into an HDF5 file.

    The file holds one dataset a protein, named by the first word of its header ('/' as %2F), and
    says in its attributes which model made it. Nothing is cut unless --max-length says so.

    \b
      rd-torch embed proteins.fasta -o mean.h5
      rd-torch embed proteins.fasta.gz -o residues.h5 --pool none --width 64
    """
    from tqdm import tqdm

    from rd_torch.embedding import embed_to_file
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    if width is not None and level is not None:
        raise ValueError("expected --width or --level, got both")
    if not output.parent.is_dir():
        raise ValueError(f"expected a folder {output.parent} to write to, got nothing there")
    proteins = _read(fasta, strict, max_length)
    name = model or DEFAULT_MODEL
    width, level = _choose(read_checkpoint(name, level).config, width, level)
    chosen = name if model else f"{name} (the shipped family; --model names another)"
    click.echo(f"Model {chosen}, level {level}, width {width}", err=True)
    embed_to_file(
        _load(name, level, dtype, device),
        proteins,
        output,
        width=width,
        progress=partial(tqdm, total=len(proteins), unit="protein"),
        attributes={"model": name, "backbone_dtype": dtype},
        **options,
    )
    click.echo(f"{len(proteins):,} proteins in {output}", err=True)


@main.command()
@fasta_argument
@option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder.")
@option("--backbones", metavar="MODEL", help="Checkpoint that has them.  [default: the shipped family]")
@option("--levels", metavar="A,B,...", help="Use only these levels, smallest first.")
@option("--regressor", type=click.Choice(["pcr", "ols", "ridge"]), default="pcr", help="Kind of prediction.")
@option("--alpha", type=float, default=1.0, help="Penalty of ridge.")
@option(
    "--added", metavar="N,...|all", help="Directions each stage adds.  [default: to the backbone's width]"
)
@option("--predict-from", type=click.Choice(["nested", "previous"]), default="nested", help="W's input.")
@budget_option
@strict_option
@device_option
@_plainly
def fit(
    fasta: Path,
    output: Path,
    backbones: str | None,
    levels: str | None,
    added: str | None,
    strict: bool,
    device: str | None,
    **options: Any,
) -> None:
    """Fit a reverse-distilled chain on the proteins of a FASTA file, in one pass.

    \b
      rd-torch fit proteins.fasta -o my-chain
      rd-torch fit proteins.fasta -o ridge --regressor ridge --alpha 10
    """
    from tqdm import tqdm

    from rd_torch.fitting import fit as fit_chain
    from rd_torch.weights import DEFAULT_MODEL

    counts = _added(added)
    proteins = _read(fasta, strict, None)
    family = _load(backbones or DEFAULT_MODEL, None, "float32", device)
    wanted = levels.split(",") if levels else list(family.backbones)
    for level in wanted:
        family.config.require_level(level)
    chain = fit_chain(
        {level: family.backbones[level] for level in wanted},
        [protein.sequence for protein in proteins],
        progress=partial(tqdm, total=len(proteins), unit="protein"),
        provenance={"backbones": dict(family.config.provenance), "fasta": fasta.name},
        added=counts,
        **options,
    )
    chain.save_pretrained(output)
    _print_levels(chain.config)
    click.echo(f"Written to {output}", err=True)


@main.command()
@click.argument("model", required=False)
@_plainly
def info(model: str | None) -> None:
    """Show levels, widths, explained variance and provenance of a checkpoint.

    \b
      rd-torch info
      rd-torch info my-chain
    """
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    config = read_checkpoint(model or DEFAULT_MODEL).config
    click.echo(f"{model or DEFAULT_MODEL}\n")
    _print_levels(config)
    click.echo(f"\npredict_from  {config.predict_from}\nspecial_rows  {config.special_rows}")
    click.echo(f"provenance    {json.dumps(config.provenance, indent=2)}")


def _read(fasta: Path, strict: bool, max_length: int | None) -> list[Protein]:
    """The normalised records of a FASTA file."""
    from rd_torch.sequences import Corrections, normalize, read_fasta

    corrections = Corrections()
    proteins = [
        normalize(protein, corrections, strict=strict, max_length=max_length) for protein in read_fasta(fasta)
    ]
    corrections.warn()
    return proteins


def _choose(config: RDConfig, width: int | None, level: str | None) -> tuple[int, str]:
    """Width and the level that holds it, from whichever is given."""
    if level is None:
        level = config.levels_for(width)[-1]
    config.require_level(level)
    return width or config.widths[level], level


def _load(name: str, level: str | None, dtype: str, device: str | None) -> RDModel:
    """A model on its device."""
    import torch

    from rd_torch.model import RDModel

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected a device that is there, got {device!r}: {error}") from error
    return RDModel.from_pretrained(name, level=level, dtype=getattr(torch, dtype), device=place)


def _added(text: str | None) -> Any:
    """The numbers of `--added`."""
    if text is None or text == "all":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected --added as numbers like 16,16 or 'all', got {text!r}") from error


def _print_levels(config: RDConfig) -> None:
    """The table of levels and what each stage explains."""
    click.echo(
        f"{'level':>8} {'layers':>6} {'heads':>5} {'backbone':>8} {'nested':>6} {'R^2':>6} {'kept':>6}"
    )
    for level, explained in zip(config.levels, (None, *config.explained), strict=True):
        shares = f" {explained.r2:6.3f} {explained.kept:6.3f}" if explained else ""
        shape = f"{level.num_layers:>6} {level.attention_heads:>5} {level.width:>8}"
        click.echo(f"{level.name:>8} {shape} {config.widths[level.name]:>6}{shares}")


if __name__ == "__main__":
    main()
