"""The records that a job on a cluster reads, cut into the windows of a run on one machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from rd_torch.letters import PROTEIN, Corrections, Kind
from rd_torch.reading import Proteins
from rd_torch.sequences import Entry, keep_sound, normalize_entries
from rd_torch.store import Folder, Names, Window, cut_windows
from rd_torch.sums import SummedWindows

BULK: Final = ("names", "contents", "lengths", "marks")
"""The large columns of a window's table; workers drop them, because the driver does not need them."""


@dataclass(frozen=True)
class Records:
    """The proteins in files that every machine sees, and how to read them.

    Attributes:
        path: a file or folder, or several of them.
        strict: whether to refuse letters that are no residue, and to stop at the first record that cannot be
            read.
        max_length: number of residues to keep of each sequence; by default all.
        identifier: which part of a header is the identifier, as for `rd_torch.Proteins`.
        columns: names of the columns of a table that hold the sequences and the identifiers; None for one
            that is guessed.
        kind: what the sequences are of; a job sets it to what its model says.
    """

    path: Path | Sequence[Path]
    strict: bool = False
    max_length: int | None = None
    identifier: str | None = None
    columns: tuple[str | None, str | None] = (None, None)
    kind: Kind = PROTEIN

    def proteins(self) -> Proteins:
        """Return the proteins, to be read on this machine.

        Returns:
            An iterable over the records of all files.

        Raises:
            ValueError: for standard input and pipes, which no other machine can read.
        """
        paths = [self.path] if isinstance(self.path, str | Path) else self.path
        proteins = Proteins(
            *paths,
            identifier=self.identifier,
            sequence_column=self.columns[0],
            identifier_column=self.columns[1],
        )
        proteins.require_files()
        return proteins

    def windows(
        self, tokens_per_batch: int, names: Names | None = None, identifier: str = "word"
    ) -> Iterator[tuple[Window[str], dict[str, Any]]]:
        """Cut the records into the same windows as a run on one machine does.

        Args:
            tokens_per_batch: number of tokens, padding included, that a batch holds at most.
            names: gives each of several records that share an identifier a name of its own. Without it, as in
                a fit, records that cannot be read are left out of the windows, and listed beside them.
            identifier: rule for headers where `Records.identifier` has none.

        Yields:
            Each window, with facts of the files up to its end: `read`, residues so far; `fraction`, share of
            the files; `corrections`, the counts of `Corrections`; `left_out`, unreadable records, as JSON.
        """
        proteins, corrections, read = self.proteins(), Corrections(), 0
        entries = normalize_entries(
            proteins.entries(identifier),
            corrections,
            strict=self.strict,
            max_length=self.max_length,
            kind=self.kind,
        )
        lost: list[Entry] = []
        if names is None:
            entries = keep_sound(entries, lost)
        # Each window waits for the next, so that the last one can list records that are lost behind it.
        last: tuple[Window[str], dict[str, Any]] | None = None
        for window in cut_windows(entries, tokens_per_batch, names):
            if last is not None:
                yield last
            read += window.residues
            known = {"read": read, "fraction": proteins.fraction, "corrections": list(astuple(corrections))}
            last = window, known | {"left_out": json.dumps(lost)}
            lost.clear()
        if last is not None:
            last[1]["left_out"] = json.dumps([*json.loads(last[1]["left_out"]), *lost])
            yield last


def read_for_store(records: Records, folder: Folder) -> Iterator[pa.Table]:
    """Read the windows of a store, on the one machine that reads the files.

    Args:
        records: the proteins.
        folder: the folder of the unfinished store.

    Yields:
        Each window as a table of one row; a window that the folder has already comes without its records.

    Raises:
        ValueError: for records that cannot be read, or differ from those that the store was begun with.
    """
    names = Names(folder.format.key)
    for window, known in records.windows(folder.facts.tokens_per_batch, names, folder.format.identifier):
        yield _table_of(window, known | {"renamed": names.renamed}, folder.find_done(window) is not None)


def read_for_fit(records: Records, tokens_per_batch: int, done: SummedWindows) -> Iterator[pa.Table]:
    """Read the windows of a fit, on the one machine that reads the files.

    Args:
        records: the proteins.
        tokens_per_batch: number of tokens, padding included, that a batch holds at most.
        done: the windows whose moments are summed already.

    Yields:
        Each window as a table of one row; a window that is done already comes without its records.

    Raises:
        ValueError: for records that cannot be read, or differ from those that the fit was begun with.
    """
    for window, known in records.windows(tokens_per_batch):
        yield _table_of(window, known | {"renamed": 0}, window in done)


def _table_of(window: Window[str], known: Mapping[str, Any], before: bool) -> pa.Table:
    """Return a window as a table of one row, without its records if it was done before."""
    row = {
        "number": window.number,
        "checksum": window.checksum,
        "residues": window.residues,
        "before": before,
        **{name: [] if before else getattr(window, name) for name in BULK[:-1]},
        "marks": json.dumps([] if before else [window.origins, list(window.faults.items())]),
        **known,
    }
    return pa.table({name: [value] for name, value in row.items()})
