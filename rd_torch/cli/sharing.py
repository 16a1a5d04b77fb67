"""One job in several processes without Ray: a shard each, or a device each."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from rd_torch.cli.reading import INCOMPLETE, list_failures
from rd_torch.cli.shared import Command, option


def sharing_options(command: Command) -> Command:
    """Adds the options that share a job among processes."""
    for add in (
        option(
            "--finish",
            is_flag=True,
            show_default=False,
            help="Embed nothing; put together what shards have done, as the last of them does by itself.",
        ),
        option(
            "--shard",
            metavar="NUMBER/COUNT|auto",
            help="Embed this share of the proteins, 3/16 say; the other shares are for other processes with "
            "the same output. auto asks Slurm's or torchrun's environment which share this is.",
        ),
        option(
            "--devices",
            metavar="DEVICE,...",
            help="Run a process on each of these devices of this machine, as cuda:0,cuda:1.",
        ),
    ):
        command = add(command)
    return command


def take_share(options: dict[str, Any], device: str | None) -> tuple[str | None, str | None]:
    """Takes the share out of a command's options: what `embed_to_store` wants to know, and the device.

    Raises:
        ValueError: for options that exclude each other.
    """
    devices, shard, finish = (options.pop(name) for name in ("devices", "shard", "finish"))
    ways = {"--devices": devices, "--shard": shard, "--finish": finish, "--cluster": options["cluster"]}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"expected one of {', '.join(ways)}, got {' and '.join(chosen)}")
    if devices and device:
        raise ValueError("expected --device or --devices, got both")
    local = os.environ.get("LOCAL_RANK")
    if shard == "auto" and device is None and local is not None:
        import torch

        if int(local) < torch.cuda.device_count():
            device = f"cuda:{local}"
    return "finish" if finish else shard, device


def on_devices(command: Callable[..., None], parameters: dict[str, Any]) -> None:
    """Runs the command in a process on each device, all on the same output, and ends as they do.

    Args:
        command: what runs, a function of a module, with the command's options by name.
        parameters: those that it was called with, `devices` among them.

    Raises:
        ChildProcessError: where one of them fails.
    """
    devices = [each.strip() for each in parameters["devices"].split(",")]
    context = get_context("spawn")
    processes = [
        context.Process(
            target=_run,
            args=(command, parameters | {"devices": None, "device": device}, number, len(devices)),
        )
        for number, device in enumerate(devices, start=1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ended = {device: process.exitcode for device, process in zip(devices, processes, strict=True)}
    failed = [f"{device} with status {code}" for device, code in ended.items() if code not in (0, INCOMPLETE)]
    if failed:
        raise ChildProcessError(
            f"expected the process of every device to end well, got {', '.join(failed)}: run the same "
            "command again, it goes on where it was"
        )
    say_done(parameters["output"], count_listed(parameters["output"]))


def _run(command: Callable[..., None], parameters: dict[str, Any], number: int, count: int) -> None:
    """A shard of the command in a process of its own; what all say alike only the first one says."""
    with Path(os.devnull).open("w") as nowhere, nullcontext() if number == 1 else redirect_stderr(nowhere):
        try:
            command(**parameters | {"shard": f"{number}/{count}"})
            return
        except click.ClickException as error:
            raised = error
    raised.show()
    raise SystemExit(raised.exit_code)


def listed_beside(output: Path) -> Path:
    """Where a store's records that were left out are listed."""
    return output.with_name(f"{output.name}.failed.tsv")


def count_listed(output: Path) -> int:
    """How many records are listed there."""
    from rd_torch.store import read_failures

    return len(read_failures(listed_beside(output)))


def say_done(output: Path, failures: int, shard: str | None = None) -> None:
    """Says what has been made, and ends the command with the status for records that were left out.

    Args:
        output: the store.
        failures: how many records this process left out.
        shard: which share this process had; None for all.
    """
    listed = listed_beside(output)
    if shard is None or output.exists():
        click.echo(f"Embeddings in {output}", err=True)
        list_failures(listed, failures if shard is None else count_listed(output))
        return
    click.echo(f"Shard {shard} is done; the last one to end puts {output} together", err=True)
    if failures:
        click.echo(f"{failures:,} of its proteins could not be embedded: {listed} will say why", err=True)
        raise SystemExit(INCOMPLETE)
