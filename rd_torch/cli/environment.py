"""The command `rd-torch env`."""

from __future__ import annotations

from typing import Any

import click

from rd_torch.cli.command import Command, option

_ATTENTION = {
    "varlen": "varlen_attn over the packed tokens",
    "blocks": "products on blocks of scores that fit the cache",
    "buckets": "scaled dot-product attention on buckets",
}


@click.command(cls=Command)
@option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs to read.")
def env(as_json: bool) -> None:
    """Show versions, devices and kernels, for bug reports.

    \b
      rd-torch env
      rd-torch env --json > environment.json
    """
    import json

    from rd_torch.environment import describe_environment

    facts = describe_environment()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(f"rd_torch {facts['rd_torch']}, Python {facts['python']}, {facts['system']}")
    there = [f"{name} {number}" for name, number in facts["packages"].items() if number]
    click.echo(_wrapped("packages", ", ".join(there)))
    missing = [name for name, number in facts["packages"].items() if not number]
    click.echo(_wrapped("not installed", ", ".join(missing) or "none"))
    variables = ", ".join(f"{name}={value}" for name, value in facts["variables"].items())
    click.echo(_wrapped("variables", variables or "none that changes anything"))
    click.echo(_wrapped("threads", f"{facts['threads']} on the CPU"))
    click.echo(_wrapped("C compiler", "found" if facts["compiler"] else "none found"))
    for device in facts["devices"]:
        _print_device(device)


def _wrapped(title: str, text: str) -> str:
    """Return a line of the report, wrapped if it is too long for a screen."""
    return click.wrap_text(f"{title:<15}{text}", width=100, subsequent_indent=" " * 15)


def _print_device(device: dict[str, Any]) -> None:
    """Print a device, and a line for each type of number."""
    memory = f"{device['memory']} GiB, {device['free']} free" if device["memory"] else "memory unknown"
    click.echo(f"\n{device['device']}: {device['name']}, {memory}")
    click.echo(f"  {'dtype':<10}{'matrix products':<17}attention")
    for dtype, kernels in device["dtypes"].items():
        attention = " or ".join(_ATTENTION[name] for name in kernels["attention"])
        emulated = "; emulated, slower than another dtype" if kernels["emulated"] else ""
        click.echo(f"  {dtype:<10}{kernels['products']:<17}{attention}{emulated}")
