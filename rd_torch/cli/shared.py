"""Options that several commands have, and what they do with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial, reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.store import FORMATS

if TYPE_CHECKING:
    import torch

    from rd_torch.cluster import Workers
    from rd_torch.config import RDConfig
    from rd_torch.model import RDModel

Command = Callable[..., None]


def plainly(command: Command) -> Command:
    """Turns errors of bad input into one line, and warnings likewise."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        """The command, quietly."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show
            try:
                command(**arguments)
            except (ValueError, OSError, MemoryError, ImportError) as error:
                raise click.ClickException(str(error)) from error

    return run


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    """Prints a warning in one line."""
    click.echo(f"Warning: {message}", err=True)


option = partial(click.option, show_default=True)
device_option = option("--device", help="cpu, cuda, cuda:1, mps, ...  [default: cuda where there is one]")
cache_option = option(
    "--cache-dir", metavar="FOLDER", help="Cache of the Hub.  [default: where HF_HOME has it]"
)

output_option = option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help=".h5, .parquet or .pt."
)
format_option = option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    help="Format.  [default: by the output's name]",
)
save_dtype_option = option(
    "--save-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    help="File's; bfloat16 in .pt alone.",
)
model_option = option(
    "--model", metavar="MODEL", help="Folder, file or Hub id.  [default: the shipped family]"
)
stop_option = option("--level", metavar="NAME", help="Stop at this level, instead of --width.")


def require_one(width: int | None, level: str | None) -> None:
    """Raises a ValueError where both were chosen."""
    if width is not None and level is not None:
        raise ValueError("expected --width or --level, got both")


budget_option = option(
    "--tokens-per-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens a batch holds at most.  [default: what half of the free memory takes]",
)
_PUBLISHED = {
    "method": (["rd", "naive"], "Reverse distillation, or the baseline.  [default: rd]"),
    "regressor": (["pcr", "linear", "ridge"], "Kind of regression.  [default: pcr]"),
    "pca": (["incremental", "fbpca"], "Kind of principal-component analysis.  [default: incremental]"),
    "sequences": (["0.5k", "1k", "5k", "10k"], "Sequences they were fitted on.  [default: 1k]"),
    "predict_from": (["nested", "previous"], "What W acts on.  [default: nested]"),
    "special_rows": (["maps", "larger"], "What stands at special tokens.  [default: maps]"),
}


def published_options(command: Command) -> Command:
    """Adds the options that choose among the authors' maps."""
    for name, (choices, text) in reversed(_PUBLISHED.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, type=click.Choice(choices), help=f"Of the authors' maps: {text}")(
            command
        )
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the chosen options of the authors' maps out of a command's options."""
    chosen = {name: options.pop(name) for name in _PUBLISHED if name in options}
    return {name: value for name, value in chosen.items() if value is not None}


_HERE = "this machine's"

_CLUSTER = (
    option(
        "--cluster",
        metavar="[ADDRESS]",
        is_flag=False,
        flag_value=_HERE,
        help="Work on the Ray cluster at HOST:PORT; without, on this machine's, started if need be.",
    ),
    option(
        "--workers",
        "count",
        type=click.IntRange(min=1),
        metavar="N",
        help="Of the cluster.  [default: as many as fit]",
    ),
    option(
        "--worker-cpus",
        "num_cpus",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="CPUs of each.  [default: 1 beside a GPU, else up to 8]",
    ),
    option(
        "--worker-gpus",
        "num_gpus",
        type=click.FloatRange(min=0),
        metavar="N",
        help="GPUs of each, or a share.  [default: 1 where there are any]",
    ),
)


def cluster_options(command: Command) -> Command:
    """Adds the options that take a job to a cluster."""
    return reduce(lambda inner, add: add(inner), reversed(_CLUSTER), command)


def joined(options: dict[str, Any], device: str | None) -> Workers | None:
    """Takes the options of a cluster out of a command's and joins it; None where none is wanted.

    Raises:
        ValueError: for workers without a cluster, or a device with one.
    """
    address = options.pop("cluster")
    wanted = {name: options.pop(name) for name in ("count", "num_cpus", "num_gpus")}
    if address is None:
        if any(value is not None for value in wanted.values()):
            raise ValueError(
                "expected --workers, --worker-cpus and --worker-gpus with --cluster, got no --cluster"
            )
        return None
    if device is not None:
        raise ValueError("expected --device or --cluster, got both: --worker-gpus 0 keeps workers on CPUs")
    from rd_torch.cluster import Workers, join

    join(None if address == _HERE else address)
    return Workers(**wanted)


def on_all_machines(name: str) -> str:
    """A model's name that holds in any folder: a path as it is from the root on."""
    return str(Path(name).resolve()) if Path(name).exists() else name


backbone_option = option(
    "--backbone",
    "sources",
    metavar="LEVEL=SOURCE",
    multiple=True,
    help="One ESM-2 from elsewhere: file, folder or Hub id; repeat it, smallest first.",
)


def by_level(sources: tuple[str, ...], form: str = "--backbone as LEVEL=SOURCE") -> dict[str, str]:
    """What was given by level, as `--backbone` is.

    Args:
        sources: as they were typed.
        form: what they are called in messages.

    Raises:
        ValueError: for one without a level, or two of one level.
    """
    named = dict(source.partition("=")[::2] for source in sources)
    if not all(named.values()) or len(named) < len(sources):
        raise ValueError(f"expected {form}, each level once, got {', '.join(sources)}")
    return named


def named(model: str | None) -> str:
    """A model as it is shown, the default one with a hint."""
    from rd_torch.weights import DEFAULT_MODEL

    return model or f"{DEFAULT_MODEL} (the shipped family; --model names another)"


def place(device: str | None) -> torch.device:
    """The device of that name, by default the best one.

    Raises:
        ValueError: for one that is not there.
    """
    import torch

    from rd_torch.hardware import best_device

    if device is None:
        return best_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected a device that is there, got {device!r}: {error}") from error


def load(name: str, level: str | None, dtype: str, device: str | None, **published: Any) -> RDModel:
    """A model on its device."""
    import torch

    from rd_torch.model import RDModel

    return RDModel.from_pretrained(name, level, getattr(torch, dtype), place(device), **published)


def print_levels(config: RDConfig) -> None:
    """The table of levels and what each stage explains."""
    click.echo(
        f"{'level':>8} {'layers':>6} {'heads':>5} {'backbone':>8} {'nested':>6} {'R^2':>6} {'kept':>6}"
    )
    for level, explained in zip(config.levels, (None, *config.explained), strict=True):
        r2 = f"{explained.r2:6.3f}" if explained and explained.r2 is not None else " " * 6
        kept = f"{explained.kept:6.3f}" if explained else ""
        shape = f"{level.num_layers:>6} {level.attention_heads:>5} {level.width:>8}"
        click.echo(f"{level.name:>8} {shape} {config.widths[level.name]:>6} {r2} {kept}".rstrip())
