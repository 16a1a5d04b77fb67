"""`rd-torch info`, `download`, `convert`, `export` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rd_torch.cli.shared import (
    backbone_option,
    by_level,
    cache_option,
    device_option,
    given,
    option,
    place,
    plainly,
    print_levels,
    published_options,
)

level_option = option("--level", metavar="NAME", help="Stop at this level; the authors' maps need one.")


@click.command()
@click.argument("model", required=False)
@level_option
@published_options
@plainly
def info(model: str | None, level: str | None, **options: Any) -> None:
    """Show levels, widths, explained variance and provenance of whatever can be loaded.

    \b
      rd-torch info
      rd-torch info my-chain
      rd-torch info singhlab/plm_reverse_distillation --level 650M
      rd-torch info esm2_t6_8M_UR50D.pt
    """
    from rd_torch.weights import DEFAULT_MODEL, read_checkpoint

    config = read_checkpoint(model or DEFAULT_MODEL, level, **given(options)).config
    click.echo(f"{model or DEFAULT_MODEL}\n")
    print_levels(config)
    click.echo(f"\nmethod        {config.method}")
    click.echo(f"predict_from  {config.predict_from}\nspecial_rows  {config.special_rows}")
    for each in config.levels:
        if each.reference:
            click.echo(
                f"backbone      {each.name}: {each.reference.repo} at {each.reference.revision or 'main'}"
            )
    click.echo(f"provenance    {json.dumps(config.provenance, indent=2)}")


@click.command()
@click.argument("level")
@cache_option
@published_options
@plainly
def download(level: str, cache_dir: str | None, **options: Any) -> None:
    """Download what LEVEL needs, so that it loads where there is no network.

    Takes ESM-2 up to LEVEL and the authors' maps between, checks their checksums, and goes on where an
    earlier download broke off.

    \b
      rd-torch download 650M
      HF_HOME=/shared/huggingface rd-torch download 3B --regressor ridge
    """
    from rd_torch.weights import PUBLISHED_MAPS, Hub, read_checkpoint

    hub = Hub(cache_dir)
    checkpoint = read_checkpoint(PUBLISHED_MAPS, level, hub, **given(options))
    for each in checkpoint.config.levels:
        for path in checkpoint.find_backbone(each, None, hub).paths:
            click.echo(f"{each.name:>5}  {path.stat().st_size / 2**20:8,.0f} MiB  {path}")
    click.echo(f"Everything for {level} is there; load it with HF_HUB_OFFLINE=1 where there is no network.")


@click.command()
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@level_option
@option(
    "--backbones",
    type=click.Choice(["included", "referenced"]),
    default="included",
    help="Their tensors, or Hub id, commit and checksums.",
)
@option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Backbones'.  [default: as it is]"
)
@published_options
@plainly
def convert(
    source: str, folder: Path, level: str | None, backbones: Any, dtype: str | None, **options: Any
) -> None:
    """Write SOURCE, the authors' maps or an ESM-2 of fair-esm's or the Hub's, as a checkpoint of ours.

    \b
      rd-torch convert singhlab/plm_reverse_distillation rd-650M --level 650M
      rd-torch convert esm2_t33_650M_UR50D.pt esm2-650M --dtype float16
    """
    import torch

    from rd_torch.model import RDModel

    model = RDModel.from_pretrained(source, level, getattr(torch, dtype or "", None), **given(options))
    model.save_pretrained(folder, backbones=backbones)
    print_levels(model.config)
    click.echo(f"Written to {folder}", err=True)


@click.command()
@click.argument("level")
@option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write: .onnx for ONNX, .pt2 for a compiled package of PyTorch's.",
)
@option(
    "--model",
    metavar="MODEL",
    help="The chain: a folder, file or Hub id.  [default: the authors' maps for 8M to 15B, else the shipped "
    "family]",
)
@backbone_option
@cache_option
@published_options
@plainly
def export(
    level: str,
    output: Path,
    model: str | None,
    sources: tuple[str, ...],
    cache_dir: str | None,
    **options: Any,
) -> None:
    """Write the chain that ends at LEVEL as a file that runs without this package.

    The file takes token ids and gives embeddings and the mask of residues, for any number of proteins of any
    length. It is run once before it is kept, and has to give the model's numbers. Its metadata hold the
    tokens and the widths of the levels.

    \b
      rd-torch export 90K -o model.onnx
      rd-torch export 35M -o model.pt2
    """
    from rd_torch.config import ESM2_LEVELS
    from rd_torch.exporting import export as write
    from rd_torch.exporting import exporter_for
    from rd_torch.model import RDModel
    from rd_torch.weights import DEFAULT_MODEL, PUBLISHED_MAPS

    exporter_for(output)
    name = model or (PUBLISHED_MAPS if level in ESM2_LEVELS else DEFAULT_MODEL)
    chain = RDModel.from_pretrained(
        name, level, backbones=by_level(sources) or None, cache_dir=cache_dir, **given(options)
    )
    print_levels(chain.config)
    write(chain, output)
    click.echo(f"Written to {output}", err=True)


@click.command()
@click.argument("level")
@option("--model", metavar="MODEL", help="Another chain than the authors' maps: folder or Hub id.")
@backbone_option
@option(
    "--fair-esm",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of fair-esm's .pt.",
)
@cache_option
@device_option
@published_options
@plainly
def verify(
    level: str,
    model: str | None,
    sources: tuple[str, ...],
    fair_esm: Path | None,
    cache_dir: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Load the real files of LEVEL, compare them with fair-esm, and print a report to paste.

    \b
      rd-torch verify 650M
      rd-torch verify 35M --fair-esm ~/.cache/torch/hub/checkpoints
    """
    from rd_torch.verifying import environment, verify_chain
    from rd_torch.weights import PUBLISHED_MAPS

    click.echo(f"rd-torch verify {level}: {environment()}")
    passed = True
    for check in verify_chain(
        model or PUBLISHED_MAPS,
        level,
        fair_esm=fair_esm,
        backbones=by_level(sources),
        cache_dir=cache_dir,
        device=place(device),
        **given(options),
    ):
        passed &= check.passed
        click.echo(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
    click.echo("PASSED" if passed else "FAILED")
    if not passed:
        raise SystemExit(1)
