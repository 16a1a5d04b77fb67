"""The base of all commands: the layout of their help, their order, and how they show errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import click
from click.types import OptionHelpExtra

Function = Callable[..., None]
"""What a command runs, with the options that decorators have added to it so far."""


class Option(click.Option):
    """An option that the help shows under a title.

    Args:
        *args: as `click.Option` takes them.
        group: the title; options without one come last.
        **settings: as `click.Option` takes them.
    """

    def __init__(self, *args: Any, group: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Return what the help appends, with defaults in words, but without click's parentheses."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


option = partial(click.option, cls=Option, show_default=True)


def add_options(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Return one decorator that adds several options to a command, in this order."""
    return lambda function: reduce(lambda inner, add: add(inner), reversed(options), function)


class Command(click.Command):
    """A command whose help shows options in groups, and whose errors are plain.

    The groups stand in the order of their first options.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help, a section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx) if isinstance(each, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(each, "group", ""), []).append(record)
        for title, records in groups.items():
            with formatter.section(title or ("Options" if len(groups) == 1 else "Other")):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command within `plain_errors`."""
        with plain_errors():
            return super().invoke(ctx)


class Group(click.Group):
    """A group of commands that lists them in the order in which they were added, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands as they were added."""
        return list(self.commands)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show warnings, and errors that can be expected, in one line each and without a traceback.

    Raises:
        click.ClickException: for such an error.
        BrokenPipeError: when nobody reads the output any more, as after `| head`: click ends quietly then.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _print_warning
        try:
            yield
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError, ImportError) as error:
            raise click.ClickException(str(error)) from error


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning in one line."""
    click.echo(f"Warning: {message}", err=True)
