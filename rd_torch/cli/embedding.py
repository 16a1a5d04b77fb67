"""`rd-torch embed` and `rd-torch fit`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.shared import (
    backbone_option,
    by_level,
    device_option,
    given,
    option,
    place,
    plainly,
    print_levels,
    published_options,
)

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.sequences import Protein

fasta_argument = click.argument("fasta", type=click.Path(path_type=Path))
budget_option = option(
    "--tokens-per-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens a batch holds at most.  [default: what half of the free memory takes]",
)
strict_option = option("--strict", is_flag=True, help="Refuse letters that are no residue, don't read X.")


@click.command()
@fasta_argument
@option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="HDF5 file.")
@option("--model", metavar="MODEL", help="Folder, file or Hub id.  [default: the shipped family]")
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
@published_options
@plainly
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
    name, published = model or DEFAULT_MODEL, given(options)
    if width is not None:
        level = read_checkpoint(name, **published).config.levels_for(width)[-1]
    chain = _load(name, level, dtype, device, **published)
    width, level = width or chain.embed_dim, list(chain.backbones)[-1]
    chosen = name if model else f"{name} (the shipped family; --model names another)"
    click.echo(f"Model {chosen}, level {level}, width {width}", err=True)
    embed_to_file(
        chain,
        proteins,
        output,
        width=width,
        progress=partial(tqdm, total=len(proteins), unit="protein"),
        attributes={"model": name, "backbone_dtype": dtype},
        **options,
    )
    click.echo(f"{len(proteins):,} proteins in {output}", err=True)


@click.command()
@fasta_argument
@option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder.")
@option("--backbones", metavar="MODEL", help="Checkpoint that has them.  [default: the shipped family]")
@backbone_option
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
@plainly
def fit(
    fasta: Path,
    output: Path,
    backbones: str | None,
    sources: tuple[str, ...],
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
      rd-torch fit proteins.fasta -o small --backbone 8M=facebook/esm2_t6_8M_UR50D \\
          --backbone 35M=facebook/esm2_t12_35M_UR50D
    """
    from tqdm import tqdm

    from rd_torch.config import check_choice
    from rd_torch.fitting import fit as fit_chain

    counts = _added(added)
    proteins = _read(fasta, strict, None)
    family, origin = _family(backbones, sources, device)
    wanted = levels.split(",") if levels else list(family)
    for level in wanted:
        check_choice("level", level, tuple(family))
    chain = fit_chain(
        {level: family[level] for level in wanted},
        [protein.sequence for protein in proteins],
        progress=partial(tqdm, total=len(proteins), unit="protein"),
        provenance={"backbones": origin, "fasta": fasta.name},
        added=counts,
        **options,
    )
    chain.save_pretrained(output)
    print_levels(chain.config)
    click.echo(f"Written to {output}", err=True)


def _read(fasta: Path, strict: bool, max_length: int | None) -> list[Protein]:
    """The normalised records of a FASTA file."""
    from rd_torch.sequences import Corrections, normalize, read_fasta

    corrections = Corrections()
    proteins = [
        normalize(protein, corrections, strict=strict, max_length=max_length) for protein in read_fasta(fasta)
    ]
    corrections.warn()
    return proteins


def _load(name: str, level: str | None, dtype: str, device: str | None, **published: Any) -> RDModel:
    """A model on its device."""
    import torch

    from rd_torch.model import RDModel

    return RDModel.from_pretrained(name, level, getattr(torch, dtype), place(device), **published)


def _family(
    checkpoint: str | None, sources: tuple[str, ...], device: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Backbones by level, from a checkpoint or from one source each, and what is known of their origin."""
    from rd_torch.weights import DEFAULT_MODEL

    if not sources:
        model = _load(checkpoint or DEFAULT_MODEL, None, "float32", device)
        return dict(model.backbones.items()), dict(model.config.provenance)
    if checkpoint:
        raise ValueError("expected --backbones or --backbone, got both")
    named = by_level(sources)
    models = {level: _load(source, None, "float32", device) for level, source in named.items()}
    return {level: next(iter(model.backbones.values())) for level, model in models.items()}, named


def _added(text: str | None) -> Any:
    """The numbers of `--added`."""
    if text is None or text == "all":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected --added as numbers like 16,16 or 'all', got {text!r}") from error
