"""The folder of an unfinished store: which windows are done, and how one is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from rd_torch.disk import move, part_folder, sync, write_whole
from rd_torch.sequences import Entry
from rd_torch.store.facts import Facts
from rd_torch.store.format import Format, Row
from rd_torch.store.windows import Window


class Failure(NamedTuple):
    """A record that could not be embedded.

    Attributes:
        residues: how many it has; 0 where it could not be read.
        reason: why.
        source: the file it is from, if any.
        line: the line where it stands there, or its number among what was given, from 1; 0 where that is not
            known.
    """

    residues: int
    reason: str
    source: str = ""
    line: int = 0


def failure_of(entry: Entry) -> Failure:
    """What is listed of a record that cannot be read."""
    return Failure(0, entry.fault, entry.source, entry.line)


@dataclass(frozen=True)
class Done:
    """What is known of a window that is written.

    Attributes:
        names: of its records, in FASTA order.
        residues: of all of them.
        checksum: the window's.
        files: their sizes in bytes, by name.
        failures: records that could not be embedded, by name.
    """

    names: list[str]
    residues: int
    checksum: str
    files: dict[str, int]
    failures: dict[str, Failure]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What is known, from its text."""
        known = json.loads(text)
        known["failures"] = {name: Failure(*why) for name, why in known["failures"].items()}
        return cls(**known)


class Folder:
    """The folder `<output>.part`, in which windows are written in any order, by any process.

    A window's files come under their names when they are whole, then `windows/<number>.json` says that the
    window is done, with the sizes of its files. So a kill at any moment loses the window under work and no
    other, and files that a crash of the machine left short are noticed and written again.

    Args:
        path: the store.
        form: its format.
        facts: what it is of.
    """

    def __init__(self, path: Path, form: Format, facts: Facts) -> None:
        self.path = path
        self.format = form
        self.facts = facts
        self.folder = part_folder(path)

    @classmethod
    def begun(cls, path: Path, form: Format) -> Self:
        """The folder that another process has made, and whose lock it holds.

        Raises:
            FileNotFoundError: where there is none.
        """
        said = part_folder(path) / "facts.json"
        if not said.is_file():
            raise FileNotFoundError(
                f"expected {said.parent} on a file system that all machines see, got nothing there"
            )
        return cls(path, form, Facts.from_json(said.read_text()))

    def done(self, window: Window[Any]) -> Done | None:
        """What is known of the window, if it is done.

        Raises:
            ValueError: when it was done with other records.
        """
        said = self.said(window.number)
        if not said.is_file():
            return None
        done = Done.from_json(said.read_text())
        if done.checksum != window.checksum:
            raise ValueError(
                f"expected the {window.kind} with which {self.path} was begun, got others in the "
                f"{len(window.names):,} records from {window.names[0]} on: take those, or another output"
            )
        files = [(self.folder / "data" / name, size) for name, size in done.files.items()]
        whole = all(path.is_file() and path.stat().st_size == size for path, size in files)
        return done if whole else None

    def write(
        self, window: Window[Any], rows: Iterable[Row], failures: Mapping[int, str], *, apart: bool = False
    ) -> None:
        """Writes a window.

        Args:
            window: the records.
            rows: their embeddings, in any order.
            failures: records that are left out, by place; looked at when all rows have come.
            apart: in a folder of its own until all is whole, for another process may write the same window.
        """
        with self._place(apart) as place:
            paths = self.format.write(place, window, rows, self.facts)
            done = Done(
                names=window.names,
                residues=window.residues,
                checksum=window.checksum,
                files={path.name: path.stat().st_size for path in paths},
                failures={
                    window.names[where]: Failure(
                        window.lengths[where] or 0, reason, *(window.places[where] if window.places else ())
                    )
                    for where, reason in failures.items()
                },
            )
            if apart:
                for path in paths:
                    move(path, self.folder / "data" / path.name, durable=False)
                sync(self.folder / "data")
            said, text = self.said(window.number), json.dumps(asdict(done))
            write_whole(place / said.name if apart else said, lambda part: part.write_text(text))
            if apart:
                move(place / said.name, said, durable=False)

    @contextmanager
    def _place(self, apart: bool) -> Iterator[Path]:
        """Where files are written: among the others, or in a folder that is removed again."""
        if not apart:
            yield self.folder / "data"
            return
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as place:
            yield Path(place)

    def said(self, number: int) -> Path:
        """The file that is there when a window is done."""
        return self.folder / "windows" / f"{number:06d}.json"

    def all(self, windows: int) -> Iterator[Done]:
        """What is known of the first windows, all of them done."""
        return (Done.from_json(self.said(number).read_text()) for number in range(windows))

    def names(self, windows: int) -> Iterator[tuple[str, Path]]:
        """Each embedded record of them in FASTA order, with the first file of its window."""
        for done in self.all(windows):
            first = self.folder / "data" / next(iter(done.files), "")
            yield from ((name, first) for name in done.names if name not in done.failures)
