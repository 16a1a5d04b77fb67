"""How far a command has come: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from rd_torch.sequences import Fasta, Protein

SECONDS_BETWEEN_LINES = 60
LINE = "{n_fmt} of about {total_fmt} residues, {rate_fmt}, {remaining} left"


class Progress:
    """Shows residues, their rate and the remaining time while a FASTA file is worked through.

    How many residues there will be is reckoned from those in the part of the file that is read.
    Called with residues that are done, and whether they were so before this run.
    """

    def __init__(self, file: Fasta) -> None:
        self._file = file
        self._read = self._done = self._before = 0
        self._reached = 0.0
        self._start = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(unit="residue", unit_scale=True, disable=not self._terminal)

    def counted(self, proteins: Iterable[Protein]) -> Iterator[Protein]:
        """The same proteins; counts what is read of them."""
        for protein in proteins:
            self._read += len(protein.sequence)
            yield protein

    def reach(self, residues: int, fraction: float) -> None:
        """Where another process reads: so many residues, from this share of the file."""
        self._read, self._reached = residues, fraction

    def __call__(self, residues: int, before: bool = False) -> None:
        self._done += residues
        self._before += residues * before
        fraction = self._reached or self._file.fraction
        total = round(self._read / fraction) if fraction else None
        if self._terminal:
            self._bar.total, self._bar.initial = total, self._before
            self._bar.update(residues)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            line = tqdm.format_meter(
                self._done,
                total or self._done,
                self._said - self._start,
                initial=self._before,
                unit="residue",
                unit_scale=True,
                bar_format=LINE,
            )
            click.echo(line, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
