"""Options that share a job among several processes or machines, and what the commands do with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.command import add_options, option, plain_errors
from rd_torch.cli.reading import INCOMPLETE, report_failures

if TYPE_CHECKING:
    from rd_torch.cluster import Workers

sharing_options = add_options(
    option(
        "--devices",
        group="Several processes",
        metavar="DEVICE,...",
        show_default="one process on --device",
        help="Run one process on each of these devices of this machine, for example cuda:0,cuda:1.",
    ),
    option(
        "--shard",
        group="Several processes",
        metavar="NUMBER/COUNT|auto",
        show_default="all proteins",
        help="Embed only this share of the proteins, for example 3/16. Processes with the same output do the "
        "other shares. auto takes the share that Slurm or torchrun gives this process.",
    ),
    option(
        "--finish",
        group="Several processes",
        is_flag=True,
        help="Embed nothing, but put the output together from shards that are done. The last shard to end "
        "does this by itself, unless it dies.",
    ),
)

_THIS_MACHINE = "this machine"


def _check_address(ctx: click.Context, parameter: click.Parameter, address: str | None) -> str | None:
    """Return the address of `--cluster`; refuse a file that was taken for it."""
    if address not in (None, _THIS_MACHINE) and ":" not in str(address):
        raise click.BadParameter(
            f"expected HOST:PORT, or nothing for the cluster of this machine, got {address!r}: write files "
            "before --cluster"
        )
    return address


cluster_options = add_options(
    option(
        "--cluster",
        group="Cluster",
        metavar="[HOST:PORT]",
        is_flag=False,
        flag_value=_THIS_MACHINE,
        callback=_check_address,
        show_default="no cluster",
        help="Work on the Ray cluster at this address. Without an address, use this machine's cluster, which "
        "is started if there is none.",
    ),
    option(
        "--workers",
        "count",
        group="Cluster",
        type=click.IntRange(min=1),
        metavar="N",
        show_default="as many as fit",
        help="Number of workers to start. Each loads the model.",
    ),
    option(
        "--worker-cpus",
        "num_cpus",
        group="Cluster",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        show_default="1 for a worker with a GPU, else up to 8",
        help="Number of CPUs for each worker.",
    ),
    option(
        "--worker-gpus",
        "num_gpus",
        group="Cluster",
        type=click.FloatRange(min=0),
        metavar="N",
        show_default="1 where the cluster has GPUs, else 0",
        help="Number of GPUs for each worker; 0.5 shares one between two workers.",
    ),
)


def take_share(options: dict[str, Any], device: str | None) -> tuple[str | None, str | None]:
    """Take the options that share a job out of a command's options.

    Returns:
        The shard as `embed_to_store` takes it, and the device of this process.

    Raises:
        ValueError: for options that exclude each other.
    """
    devices, shard, finish = (options.pop(name) for name in ("devices", "shard", "finish"))
    ways = {"--devices": devices, "--shard": shard, "--finish": finish, "--cluster": options["cluster"]}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"expected at most one of {', '.join(ways)}, got {' and '.join(chosen)}")
    if devices and device:
        raise ValueError("expected --device or --devices, got both")
    local = os.environ.get("LOCAL_RANK")
    if shard == "auto" and device is None and local is not None:
        import torch

        if int(local) < torch.cuda.device_count():
            device = f"cuda:{local}"
    return "finish" if finish else shard, device


def join_cluster(options: dict[str, Any], device: str | None) -> Workers | None:
    """Take the options of a cluster out of a command's options, and join it.

    Returns:
        The workers to start; None if no cluster is wanted.

    Raises:
        ValueError: for workers without a cluster, and for a device together with a cluster.
    """
    address = options.pop("cluster")
    wanted = {name: options.pop(name) for name in ("count", "num_cpus", "num_gpus")}
    if address is None:
        if any(value is not None for value in wanted.values()):
            raise ValueError(
                "expected --cluster with --workers, --worker-cpus and --worker-gpus, got no --cluster"
            )
        return None
    if device is not None:
        raise ValueError("expected --device or --cluster, got both: to compute on CPUs, give --worker-gpus 0")
    from rd_torch.cluster import Workers, join

    join(None if address == _THIS_MACHINE else address)
    return Workers(**wanted)


def run_on_devices(function: Callable[..., None], parameters: dict[str, Any]) -> None:
    """Run a command once on each device, in processes that share one output, and end as they end.

    Args:
        function: what each process calls; a function of a module.
        parameters: the command's options by name; `devices` among them names the devices.

    Raises:
        ValueError: if one of the devices has no name.
        ChildProcessError: if one of the processes fails.
    """
    from multiprocessing import get_context

    devices = [each.strip() for each in parameters["devices"].split(",")]
    if not all(devices):
        raise ValueError(
            f"expected --devices as names with commas between them, got {parameters['devices']!r}"
        )
    context = get_context("spawn")
    processes = [
        context.Process(
            target=_run_shard,
            args=(function, parameters | {"devices": None, "device": device}, number, len(devices)),
        )
        for number, device in enumerate(devices, start=1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ended = {device: process.exitcode for device, process in zip(devices, processes, strict=True)}
    failed = [f"{code} on {device!r}" for device, code in ended.items() if code not in (0, INCOMPLETE)]
    if failed:
        raise ChildProcessError(
            f"expected the process on every device to succeed, got exit status {', '.join(failed)}: run the "
            "same command again, and it continues where it stopped"
        )
    report_done(parameters["output"], count_failures(parameters["output"]))


def _run_shard(function: Callable[..., None], parameters: dict[str, Any], number: int, count: int) -> None:
    """Run one shard of a command in a process of its own.

    Only the first shard prints what all of them would print alike.
    """
    with Path(os.devnull).open("w") as nowhere, nullcontext() if number == 1 else redirect_stderr(nowhere):
        try:
            with plain_errors():
                function(**parameters | {"shard": f"{number}/{count}"})
            return
        except click.ClickException as error:
            raised = error
    raised.show()
    raise SystemExit(raised.exit_code)


def count_failures(output: Path) -> int:
    """Return the number of records that are listed beside an output."""
    from rd_torch.store import failure_list, read_failures

    return len(read_failures(failure_list(output)))


def report_done(output: Path, failures: int, shard: str | None = None) -> None:
    """Print what has been made, and end the command with `INCOMPLETE` if records were left out.

    Args:
        output: the store.
        failures: the number of records that this process left out.
        shard: the share that this process had; None for all proteins.
    """
    from rd_torch.store import failure_list

    listed = failure_list(output)
    if shard is None or output.exists():
        click.echo(f"Wrote the embeddings to {output}.", err=True)
        report_failures(listed, failures if shard is None else count_failures(output))
        return
    click.echo(f"Shard {shard} is done. The last shard to end will put {output} together.", err=True)
    if failures:
        click.echo(
            f"Left out {failures:,} of its proteins. {listed} will list them with the reasons.", err=True
        )
        raise SystemExit(INCOMPLETE)
