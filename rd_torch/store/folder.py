"""`Folder`: the folder in which a store is written window by window, and what it knows of each window."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from rd_torch.disk import move, part_folder, sync, write_whole
from rd_torch.store.facts import Facts
from rd_torch.store.failures import Failure
from rd_torch.store.format import Format, Row
from rd_torch.store.windows import Window

FACTS_FILE: Final = "facts.json"
"""Name of the file in the folder that has the facts of the store."""


@dataclass(frozen=True)
class DoneWindow:
    """What is recorded of a window that is written.

    Attributes:
        names: names of its records, in FASTA order.
        residues: number of residues of all of them.
        checksum: the window's checksum.
        files: size in bytes of each of its files, by name.
        failures: the records that could not be embedded, by name.
    """

    names: list[str]
    residues: int
    checksum: str
    files: dict[str, int]
    failures: dict[str, Failure]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what is recorded from its JSON."""
        values = json.loads(text)
        values["failures"] = {name: Failure(*failure) for name, failure in values["failures"].items()}
        return cls(**values)


class Folder:
    """The folder `<output>.part`, in which any process writes windows of a store, in any order.

    A window's files take their names when they are whole. Then the file `windows/<number>.json` records that
    the window is done, with the sizes of its files. So a kill at any moment loses no more than the window
    that is being written, and files that a crash of the machine cut short are noticed and written again.

    Args:
        path: the store.
        form: its format.
        facts: what is embedded with what.
    """

    def __init__(self, path: Path, form: Format, facts: Facts) -> None:
        self.path = path
        self.format = form
        self.facts = facts
        self.folder = part_folder(path)

    @classmethod
    def open(cls, path: Path, form: Format) -> Self:
        """Open the folder that another process has made, and whose lock that process holds.

        Args:
            path: the store.
            form: its format.

        Returns:
            The folder, with the facts that stand in it.

        Raises:
            FileNotFoundError: where there is no such folder.
        """
        file = part_folder(path) / FACTS_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"expected {file.parent} on a file system that all machines see, got nothing there"
            )
        return cls(path, form, Facts.from_json(file.read_text()))

    def find_done(self, window: Window[Any]) -> DoneWindow | None:
        """Look up a window.

        Args:
            window: the records that are embedded now.

        Returns:
            What is recorded of it; None where it is not done, or one of its files is not whole.

        Raises:
            ValueError: where it was done with other records.
        """
        file = self.done_file(window.number)
        if not file.is_file():
            return None
        done = DoneWindow.from_json(file.read_text())
        if done.checksum != window.checksum:
            raise ValueError(
                f"expected the {window.kind} with which {self.path} was begun, got others in the "
                f"{len(window.names):,} records from {window.names[0]} on: use those, or choose another "
                "output"
            )
        sizes = [(self.folder / "data" / name, size) for name, size in done.files.items()]
        whole = all(path.is_file() and path.stat().st_size == size for path, size in sizes)
        return done if whole else None

    def write(
        self, window: Window[Any], rows: Iterable[Row], failures: Mapping[int, str], *, apart: bool = False
    ) -> None:
        """Write a window and record that it is done.

        Args:
            window: the records.
            rows: their embeddings, in any order.
            failures: why records are left out, by their place in the window; read after all rows have come.
            apart: write in a folder of its own until everything is whole, because another process may be
                writing the same window.
        """
        with self._choose_folder(apart) as folder:
            paths = self.format.write(folder, window, rows, self.facts)
            done = DoneWindow(
                names=window.names,
                residues=window.residues,
                checksum=window.checksum,
                files={path.name: path.stat().st_size for path in paths},
                failures=_failures_by_name(window, failures),
            )
            if apart:
                for path in paths:
                    move(path, self.folder / "data" / path.name, durable=False)
                sync(self.folder / "data")
            file, text = self.done_file(window.number), json.dumps(asdict(done))
            write_whole(folder / file.name if apart else file, lambda part: part.write_text(text))
            if apart:
                move(folder / file.name, file, durable=False)

    @contextmanager
    def _choose_folder(self, apart: bool) -> Iterator[Path]:
        """Return the folder to write files in: that of all windows, or one that is removed afterwards."""
        if not apart:
            yield self.folder / "data"
            return
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def done_file(self, number: int) -> Path:
        """Return the file that records that a window is done."""
        return self.folder / "windows" / f"{number:06d}.json"

    def read_done(self, numbers: Iterable[int]) -> Iterator[DoneWindow]:
        """Read what is recorded of windows that are done, by their numbers."""
        return (DoneWindow.from_json(self.done_file(number).read_text()) for number in numbers)

    def locate_records(self, windows: int) -> Iterator[tuple[str, Path]]:
        """Find the embedded records of the first windows, all of which are done.

        Args:
            windows: number of windows.

        Yields:
            The name of each record in FASTA order, and the first file of its window.
        """
        for done in self.read_done(range(windows)):
            first = self.folder / "data" / next(iter(done.files), "")
            yield from ((name, first) for name in done.names if name not in done.failures)


def _failures_by_name(window: Window[Any], failures: Mapping[int, str]) -> dict[str, Failure]:
    """Return the records of a window that are left out, by name."""
    return {
        window.names[place]: Failure(
            window.lengths[place] or 0, reason, *(window.origins[place] if window.origins else ())
        )
        for place, reason in failures.items()
    }
