"""Show how far a command has come: as a bar on a terminal, and as a line every minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from rd_torch.reading import Proteins
    from rd_torch.sequences import Entry

SECONDS_BETWEEN_LINES = 60
LINE = "{n_fmt} of about {total_fmt} {unit}s, {rate_fmt}, {remaining} left"


class Bar:
    """A display of how much is done, the rate, and the remaining time.

    Call it with the amount that is newly done, and with `before=True` if an earlier run had done it.

    Args:
        unit: what is counted, in the singular.
        total: how much there is in all; None if that is unknown.
    """

    def __init__(self, unit: str, total: int | None = None) -> None:
        self._unit, self._total = unit, total
        self._done = self._done_before = 0
        self._start = self._last_line = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(unit=unit, unit_scale=True, disable=not self._is_terminal)

    @property
    def total(self) -> int | None:
        """How much there is in all; None if that is unknown."""
        return self._total

    def __call__(self, done: int, before: bool = False) -> None:
        self._done += done
        self._done_before += done * before
        if self._is_terminal:
            self._bar.total, self._bar.initial = self.total, self._done_before
            self._bar.update(done)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            line = tqdm.format_meter(
                self._done,
                self.total or self._done,
                self._last_line - self._start,
                initial=self._done_before,
                unit=self._unit,
                unit_scale=True,
                bar_format=LINE,
            )
            click.echo(line, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class ResidueBar(Bar):
    """A display of the residues that are done while files of proteins are read.

    The total is estimated from the residues in the part of the files that has been read. A pipe does not
    tell its length, so it has no total.

    Args:
        proteins: the proteins that are read.
    """

    def __init__(self, proteins: Proteins) -> None:
        super().__init__("residue")
        self._proteins, self._read, self._reached = proteins, 0, 0.0

    @property
    def total(self) -> int | None:
        """About how many residues there are in all; None if that is unknown."""
        fraction = self._reached or self._proteins.fraction
        return round(self._read / fraction) if fraction else None

    def count_read(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Pass the records on, and count their residues as read."""
        for entry in entries:
            self._read += len(entry.sequence)
            yield entry

    def reach(self, residues: int, fraction: float) -> None:
        """Take over how far another process has read: so many residues, and this share of the files."""
        self._read, self._reached = residues, fraction
