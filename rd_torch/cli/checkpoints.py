"""The commands `rd-torch info`, `download`, `convert`, `export` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from rd_torch.choices import FloatType, Storage
from rd_torch.cli.command import Command, option
from rd_torch.cli.shared import (
    backbone_option,
    cache_option,
    device_option,
    find_device,
    level_option,
    model_for,
    print_levels,
    published_options,
    split_by_level,
    take_published,
    trust_option,
)

if TYPE_CHECKING:
    from rd_torch.weights import Files


@click.command(cls=Command)
@click.argument("model", required=False)
@level_option
@trust_option
@published_options
def info(model: str | None, level: str | None, trusted: tuple[str, ...], **options: Any) -> None:
    """Show the levels, widths and origin of a model.

    \b
      rd-torch info
      rd-torch info my-chain
      rd-torch info singhlab/plm_reverse_distillation --level 650M
      rd-torch info esm2_t6_8M_UR50D.pt

    MODEL is a folder, a file or an id on the Hugging Face Hub, or, after hf:, the folder or id of any encoder
    that transformers loads. Without it, the command shows the small family that ships with rd-torch.

    The table has a row for each level. Where a level is taken from a hidden layer, as 650M@25 is, layers are
    those that run, of how many. R^2 is the share of its backbone's variance that the smaller levels
    predict, and kept is the share of the rest that the added features hold.
    """
    from rd_torch.model import RDModel
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    published = take_published(options)
    if model is not None and model.startswith("hf:"):  # only the model itself tells what it is
        config = RDModel.from_pretrained(model, level, trust_remote_code=trusted, **published).config
    else:
        config = read_checkpoint(model or DEFAULT_MODEL, level, **published).config
    click.echo(f"{model or DEFAULT_MODEL}\n")
    print_levels(config)
    click.echo(f"\nmethod        {config.method}")
    click.echo(f"predict_from  {config.predict_from}\nspecial_rows  {config.special_rows}")
    if config.has_basis:
        for name, fact in config.basis.items():
            click.echo(f"{name:14}{fact if isinstance(fact, str) else json.dumps(fact)}")
        first = config.levels[0].name
        click.echo(f"The first features are {first}'s in new coordinates, and not its own to the bit.")
    if config.hidden_norm is not None:
        click.echo(f"final_norm    {'on hidden layers too' if config.final_norm else 'on last layers alone'}")
    for name, each in {level.backbone: level for level in config.levels}.items():
        if each.reference:
            click.echo(f"backbone      {name}: {each.reference.repo} at {each.reference.revision or 'main'}")
    click.echo(f"provenance    {json.dumps(config.provenance, indent=2)}")


@click.command(cls=Command)
@click.argument("level")
@cache_option
@published_options
def download(level: str, cache_dir: str | None, **options: Any) -> None:
    """Download the files of a level, for use without network.

    \b
      rd-torch download 650M
      HF_HOME=/shared/huggingface rd-torch download 3B --regressor ridge
      rd-torch download 600M

    LEVEL is 8M, 35M, 150M, 650M, 3B or 15B for ESM-2, and 300M, 600M or 6B for ESM-C. The command downloads
    the family's models up to LEVEL and, for ESM-2, the authors' maps between them, and compares their
    checksums. If it is interrupted, run it again: it continues where it stopped.
    """
    for name, files in _find_files(level, cache_dir, take_published(options)):
        for path in files.paths:
            click.echo(f"{name:>5}  {path.stat().st_size / 2**20:8,.0f} MiB  {path}")
    click.echo(
        f"All files for {level} are there. Where there is no network, set HF_HUB_OFFLINE=1 to load them."
    )


def _find_files(level: str, cache_dir: str | None, published: dict[str, Any]) -> Iterator[tuple[str, Files]]:
    """Yield the name and the files of each level up to the given one, downloaded if need be."""
    from rd_torch.weights import ON_HUB, PUBLISHED_MAPS, Hub, find_backbone, read_checkpoint

    hub, sizes = Hub(cache_dir), ON_HUB["esmc"]
    if level not in sizes:
        checkpoint = read_checkpoint(PUBLISHED_MAPS, level, hub, **published)
        for each in checkpoint.config.levels:
            yield each.name, checkpoint.find_backbone(each, None, hub)
        return
    if published:
        raise ValueError(f"expected options of the authors' maps with a level of ESM-2, got level {level}")
    for name in list(sizes)[: list(sizes).index(level) + 1]:
        yield name, find_backbone(sizes[name], hub)


@click.command(cls=Command)
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@option(
    "--backbones",
    group="Output",
    type=click.Choice(get_args(Storage)),
    default="included",
    help="Write the backbones into FOLDER (included), or only their Hub ids, commits and checksums "
    "(referenced).",
)
@option(
    "--dtype",
    group="Output",
    type=click.Choice(get_args(FloatType)),
    show_default="as in SOURCE",
    help="Type of number in which the backbones are written.",
)
@level_option
@trust_option
@published_options
def convert(
    source: str,
    folder: Path,
    level: str | None,
    backbones: Any,
    dtype: str | None,
    trusted: tuple[str, ...],
    **options: Any,
) -> None:
    """Write a model from elsewhere as a checkpoint of rd-torch.

    \b
      rd-torch convert singhlab/plm_reverse_distillation rd-650M --level 650M
      rd-torch convert esm2_t33_650M_UR50D.pt esm2-650M --dtype float16

    SOURCE is the authors' maps, or one ESM-2 or ESM-C: a file of fair-esm, or a file, folder or Hub id of
    transformers. After hf: it is the folder or Hub id of any encoder that transformers loads. FOLDER is the
    folder to write.
    """
    import torch

    from rd_torch.model import RDModel

    model = RDModel.from_pretrained(
        source, level, getattr(torch, dtype or "", None), trust_remote_code=trusted, **take_published(options)
    )
    model.save_pretrained(folder, backbones=backbones)
    print_levels(model.config)
    click.echo(f"Wrote the checkpoint to {folder}.", err=True)


@click.command(cls=Command)
@click.argument("level")
@option(
    "-o",
    "--output",
    group="Output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write. A name in .onnx gives ONNX, a name in .pt2 a compiled package of PyTorch.",
)
@option(
    "--model",
    group="Model",
    metavar="MODEL",
    show_default="the authors' maps for 8M to 15B, ESM-C itself for 300M to 6B, else the small family that "
    "ships with rd-torch",
    help="Model to export: a folder, a file, or an id on the Hugging Face Hub.",
)
@backbone_option
@cache_option
@published_options
def export(
    level: str,
    output: Path,
    model: str | None,
    sources: tuple[str, ...],
    cache_dir: str | None,
    **options: Any,
) -> None:
    """Write a model as one file that runs without rd-torch.

    \b
      rd-torch export 90K -o model.onnx
      rd-torch export 35M -o model.pt2

    The file holds the model up to LEVEL. It takes token ids, and gives embeddings and the mask of residues,
    for any number of proteins of any length. Its metadata name the tokens and the widths of the levels.

    The command runs the file before it keeps it, and compares its embeddings with the model's.
    """
    from rd_torch.exporting import MismatchError, exporter_for
    from rd_torch.exporting import export as write
    from rd_torch.model import RDModel
    from rd_torch.weights import DEFAULT_MODEL

    exporter_for(output)
    name = model or model_for(level, DEFAULT_MODEL)
    backbones = split_by_level(sources) or None
    chain = RDModel.from_pretrained(
        name, level, backbones=backbones, cache_dir=cache_dir, **take_published(options)
    )
    print_levels(chain.config)
    try:
        write(chain, output)
    except MismatchError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote the model to {output}.", err=True)


@click.command(cls=Command)
@click.argument("level")
@option(
    "--model",
    group="Model",
    metavar="MODEL",
    show_default="the authors' maps; for 300M, 600M and 6B ESM-C itself",
    help="Model to verify: a folder, a file, or an id on the Hugging Face Hub.",
)
@backbone_option
@option(
    "--fair-esm",
    group="Model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    show_default="without them",
    help="Folder of fair-esm's own .pt files, to compare the tensors in them too.",
)
@cache_option
@device_option
@published_options
def verify(
    level: str,
    model: str | None,
    sources: tuple[str, ...],
    fair_esm: Path | None,
    cache_dir: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Compare the files of a level with fair-esm or transformers.

    \b
      rd-torch verify 650M
      rd-torch verify 35M --fair-esm ~/.cache/torch/hub/checkpoints
      rd-torch verify 600M

    The command loads the model up to LEVEL, compares what its backbones compute with fair-esm, or for ESM-C
    with transformers (5.16 or newer), and prints a report that you can paste into an issue. The exit status
    is 1 if a check fails.
    """
    from rd_torch.verifying import environment, verify_chain
    from rd_torch.weights import PUBLISHED_MAPS

    click.echo(f"rd-torch verify {level}: {environment()}")
    passed = True
    for check in verify_chain(
        model or model_for(level, PUBLISHED_MAPS),
        level,
        fair_esm=fair_esm,
        backbones=split_by_level(sources),
        cache_dir=cache_dir,
        device=find_device(device),
        **take_published(options),
    ):
        passed &= check.passed
        click.echo(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
    click.echo("PASSED" if passed else "FAILED")
    if not passed:
        raise SystemExit(1)
