"""How far a command has come: a bar on a terminal, a line a minute elsewhere."""

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
    """Shows how much is done, at what rate, and the remaining time.

    Called with how much is done, and whether it was so before this run.

    Args:
        unit: what is counted.
        total: how much there is; None where that is not known.
    """

    def __init__(self, unit: str, total: int | None = None) -> None:
        self._unit, self._total = unit, total
        self._done = self._before = 0
        self._said = time.monotonic()
        self._start = self._said
        self._terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(unit=unit, unit_scale=True, disable=not self._terminal)

    @property
    def total(self) -> int | None:
        """How much there is."""
        return self._total

    def __call__(self, done: int, before: bool = False) -> None:
        self._done += done
        self._before += done * before
        if self._terminal:
            self._bar.total, self._bar.initial = self.total, self._before
            self._bar.update(done)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            line = tqdm.format_meter(
                self._done,
                self.total or self._done,
                self._said - self._start,
                initial=self._before,
                unit=self._unit,
                unit_scale=True,
                bar_format=LINE,
            )
            click.echo(line, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Progress(Bar):
    """Shows residues while files of proteins are worked through.

    How many residues there will be is reckoned from those in the part of the files that is read; a pipe does
    not say how long it is.
    """

    def __init__(self, proteins: Proteins) -> None:
        super().__init__("residue")
        self._proteins, self._read, self._reached = proteins, 0, 0.0

    @property
    def total(self) -> int | None:
        """About how many residues there are."""
        fraction = self._reached or self._proteins.fraction
        return round(self._read / fraction) if fraction else None

    def counted(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The same records; counts what is read of them."""
        for entry in entries:
            self._read += len(entry.sequence)
            yield entry

    def reach(self, residues: int, fraction: float) -> None:
        """Where another process reads: so many residues, from this share of the file."""
        self._read, self._reached = residues, fraction
