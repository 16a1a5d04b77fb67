"""Options that several commands have, and what the commands do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from rd_torch.choices import (
    PCA,
    FloatType,
    Method,
    PredictFrom,
    PublishedRegressor,
    SequenceCount,
    SpecialRows,
)
from rd_torch.cli.command import add_options, option
from rd_torch.store import FORMATS

if TYPE_CHECKING:
    import torch

    from rd_torch.config import RDConfig
    from rd_torch.levels import Level
    from rd_torch.model import RDModel

output_option = option(
    "-o",
    "--output",
    group="Output",
    required=True,
    type=click.Path(path_type=Path),
    help="File or folder to write. The ending of its name chooses the format: "
    f"{', '.join(f'.{name}' for name in FORMATS)}.",
)
format_option = option(
    "--format",
    "form",
    group="Output",
    type=click.Choice(list(FORMATS)),
    show_default="as the output's name ends",
    help="Write this format, whatever the output's name ends in.",
)
save_dtype_option = option(
    "--save-dtype",
    group="Output",
    type=click.Choice(get_args(FloatType)),
    default="float32",
    help="Type of the numbers in the output. Only .pt can hold bfloat16.",
)
model_option = option(
    "--model",
    group="Model",
    metavar="MODEL",
    show_default="the small family that ships with rd-torch",
    help="Model to use: a folder, a file, or an id on the Hugging Face Hub. hf: before a folder or an id "
    "takes any encoder that transformers loads.",
)
until_option = option(
    "--level",
    group="Model",
    metavar="NAME",
    show_default="all levels",
    help="Keep the features up to this level, 650M for example, instead of giving --width. The authors' maps "
    "need a level.",
)
level_option = option(
    "--level",
    group="Model",
    metavar="NAME",
    show_default="the model's largest",
    help="Use the model up to this level, 650M for example. The authors' maps need a level.",
)
backbone_option = option(
    "--backbone",
    "sources",
    group="Model",
    metavar="LEVEL=SOURCE",
    multiple=True,
    show_default="the one that the model names",
    help="Take the backbone of this level from a file, a folder or a Hub id, as in 8M=esm2_t6_8M_UR50D.pt. "
    "hf: before a folder or a Hub id takes any encoder that transformers loads. Repeat this for other "
    "levels, smallest first.",
)
trust_option = option(
    "--trust-remote-code",
    "trusted",
    group="Model",
    metavar="NAME",
    multiple=True,
    show_default="no such code is run",
    help="Run the Python code that comes with the files of this model, which is named as after hf:. Read the "
    "code first.",
)
cache_option = option(
    "--cache-dir",
    group="Model",
    metavar="FOLDER",
    show_default="the Hub's own, which HF_HOME can move",
    help="Folder that keeps downloads from the Hugging Face Hub.",
)
device_option = option(
    "--device",
    group="Speed",
    metavar="DEVICE",
    show_default="cuda where there is a GPU, else cpu",
    help="Device to compute on: cpu, cuda, cuda:1, mps and so on.",
)
dtype_option = option(
    "--dtype",
    group="Speed",
    type=click.Choice(get_args(FloatType)),
    default="float32",
    help="Type of number in which the backbones compute. float16 and bfloat16 are less exact, and faster "
    "where the device supports them.",
)
budget_option = option(
    "--tokens-per-batch",
    group="Speed",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="what half of the free memory takes",
    help="Largest number of tokens in a batch. For ESM-2 and ESM-C a protein has a token for each residue "
    "and two more.",
)

_PUBLISHED = {
    "method": (
        Method,
        "rd",
        "Reverse distillation (rd), or the baseline: principal components of joined embeddings (naive).",
    ),
    "regressor": (PublishedRegressor, "pcr", "Kind of regression in the maps."),
    "pca": (PCA, "incremental", "Kind of principal-component analysis in the maps."),
    "sequences": (SequenceCount, "1k", "Number of sequences on which the maps were fitted."),
    "predict_from": (
        PredictFrom,
        "nested",
        "Apply each regression to the nested embedding so far, or to the previous backbone's own embedding.",
    ),
    "special_rows": (
        SpecialRows,
        "maps",
        "Put at <cls>, <eos> and <mask> what the maps give, or the largest backbone's own vectors.",
    ),
}
published_options = add_options(
    *(
        option(
            f"--{name.replace('_', '-')}",
            group="The authors' maps (singhlab/plm_reverse_distillation)",
            type=click.Choice(get_args(choices)),
            show_default=default,
            help=text,
        )
        for name, (choices, default, text) in _PUBLISHED.items()
    )
)


def take_published(options: dict[str, Any]) -> dict[str, Any]:
    """Take the choice among the authors' maps out of a command's options; return what the user chose."""
    taken = {name: options.pop(name) for name in _PUBLISHED}
    return {name: value for name, value in taken.items() if value is not None}


def require_one(width: int | None, level: str | None) -> None:
    """Raise a ValueError if both a width and a level were given."""
    if width is not None and level is not None:
        raise ValueError("expected --width or --level, got both")


def absolute_name(name: str) -> str:
    """Return a model's name that holds in any folder: paths become absolute, other names stay."""
    mark, name = ("hf:", name[3:]) if name.startswith("hf:") else ("", name)
    return mark + (str(Path(name).resolve()) if Path(name).exists() else name)


def split_by_level(pairs: tuple[str, ...], form: str = "--backbone as LEVEL=SOURCE") -> dict[str, str]:
    """Split texts such as `"8M=esm2.pt"` into levels and what stands for each.

    Args:
        pairs: the texts as the user typed them.
        form: how error messages name them.

    Raises:
        ValueError: for a text without a level or without a source, and for a level that comes twice.
    """
    sources = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(sources.values()) or len(sources) < len(pairs):
        raise ValueError(f"expected {form}, each level once, got {', '.join(pairs)}")
    return sources


def model_for(level: str, otherwise: str) -> str:
    """Return the model that holds a level where the user names none.

    Args:
        level: name of the level. Sizes of ESM-2 are in the authors' maps; one of ESM-C is a model alone.
        otherwise: model for every other level.
    """
    from rd_torch.levels import ESM2_LEVELS
    from rd_torch.weights import ON_HUB, PUBLISHED_MAPS

    if level in ON_HUB["esmc"]:
        return ON_HUB["esmc"][level].repo
    return PUBLISHED_MAPS if level in ESM2_LEVELS else otherwise


def model_title(model: str | None) -> str:
    """Return a model's name for messages; the default one comes with a hint."""
    from rd_torch.weights import DEFAULT_MODEL

    return model or f"{DEFAULT_MODEL} (the shipped family; --model names another)"


def find_device(name: str | None) -> torch.device:
    """Find the device of that name, or the best one if no name is given.

    Raises:
        ValueError: if this machine has no such device.
    """
    import torch

    from rd_torch.hardware import best_device

    if name is None:
        return best_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected a device that this machine has, got {name!r}: {error}") from error


def load_model(name: str, level: str | None, dtype: str, device: str | None, **published: Any) -> RDModel:
    """Load a model onto a device.

    Args:
        name: a folder, a file or a Hub id.
        level: the last level to load; all levels by default.
        dtype: the type of number in which the backbones compute.
        device: the device's name; the best device by default.
        **published: the choice among the authors' maps, and other options of `RDModel.from_pretrained`.
    """
    import torch

    from rd_torch.model import RDModel

    return RDModel.from_pretrained(name, level, getattr(torch, dtype), find_device(device), **published)


def _layers(level: Level) -> str:
    """Return how many layers of a backbone run, and of how many where some do not."""
    if level.is_last or level.num_layers is None:
        return str(level.depth or "")
    return f"{level.depth} of {level.num_layers}"


def print_levels(config: RDConfig) -> None:
    """Print a table of a model's levels, with what each stage explains."""
    click.echo(
        f"{'level':>8} {'family':>12} {'layers':>8} {'heads':>5} {'backbone':>8} {'nested':>6} {'R^2':>6} "
        f"{'kept':>6}"
    )
    for level, explained in zip(config.levels, (None, *config.explained), strict=True):
        r2 = f"{explained.r2:6.3f}" if explained and explained.r2 is not None else " " * 6
        kept = f"{explained.kept:6.3f}" if explained else ""
        shape = f"{level.title:>12} {_layers(level):>8} {level.attention_heads or '':>5} {level.width:>8}"
        click.echo(f"{level.name:>8} {shape} {config.widths[level.name]:>6} {r2} {kept}".rstrip())
