"""A store that is being written: which windows are done, and the folder where they lie until all are."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from filelock import FileLock, Timeout

from rd_torch.batching import ahead
from rd_torch.store.facts import Facts
from rd_torch.store.folder import Failure, Folder
from rd_torch.store.format import Format, Row, require_fitting, require_folder, sync, written_whole
from rd_torch.store.store import Store
from rd_torch.store.windows import Content, Length, Window

Compute: TypeAlias = Callable[[Window[Content], dict[int, str]], Iterable[list[Row]]]

Report: TypeAlias = Callable[[list[Length], bool], object]
"""Called with the lengths of records that are done, and whether they were so before."""

Progress: TypeAlias = Callable[[int, bool], object]
"""Called with how much is done, and whether it was so before."""

LOCK: Final = "lock"
"""The file by which a folder of work is held."""

_COLUMNS: Final = ("identifier", "residues", "reason", "file", "line")
"""Of the list of what could not be embedded."""

BATCHES_AHEAD: Final = 2
"""Batches that are computed while one is written."""


class Work(Folder):
    """The folder `<output>.part` under a lock, which becomes the store when its last window is done.

    Args:
        path: the store.
        form: its format.
        facts: what it is of.
        fixed_budget: whether `tokens_per_batch` must be the recorded one; else the recorded one counts.

    Raises:
        FileNotFoundError: when the store's folder is not there.
        BlockingIOError: when another process writes the store.
        ValueError: for a dtype or pooling that the format does not take, when something else is there, or a
            store of other facts.
    """

    def __init__(self, path: Path, form: Format, facts: Facts, *, fixed_budget: bool = False) -> None:
        require_fitting(form, facts)
        require_folder(path)
        super().__init__(path, form, facts)
        self._checksum: str | None = None
        begun = self._begun()
        if begun is not None:
            facts.require_same(begun, str(path))
            if fixed_budget and facts.tokens_per_batch != begun.tokens_per_batch:
                raise ValueError(
                    f"expected tokens_per_batch {begun.tokens_per_batch}, with which {path} was begun, got "
                    f"{facts.tokens_per_batch}: leave it out, or take another output"
                )
            self.facts = begun
        self._lock: FileLock | None = None if self.is_finished else self._taken()

    @property
    def is_finished(self) -> bool:
        """Whether the store is there already; nothing is written then."""
        return self._checksum is not None

    def _begun(self) -> Facts | None:
        """The facts of the finished or unfinished store, if there is one."""
        if self.path.exists():
            with _opened(self.format, self.path) as store:
                self._checksum = store.checksum
                return store.facts
        said = self.folder / "facts.json"
        return Facts.from_json(said.read_text()) if said.is_file() else None

    def _taken(self) -> FileLock:
        """Makes the folder and takes its lock."""
        for name in ("data", "windows"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lock = locked(self.folder, self.path)
        written_whole(self.folder / "facts.json", lambda part: part.write_text(self.facts.to_json()))
        return lock

    def fill(
        self, windows: Iterable[Window[Content]], compute: Compute[Content], report: Report
    ) -> dict[str, Failure]:
        """Computes and writes what is not done, and finishes the store.

        Batches are computed in a thread of its own while those before them are written, and a window only
        when the one before it is done: so no more than one window is ever lost.

        Args:
            windows: all of them, in order.
            compute: embeds a window, batch by batch; takes what cannot be embedded, by place with the
                reason, into the dictionary.
            report: called with the lengths of records that are done, and whether they were so before.

        Returns:
            The records that could not be embedded, by name.

        Raises:
            ValueError: for no windows, or others than the store was begun with.
        """
        last: Window[Any] | None = None
        for window in windows:
            last = window
            if self.is_finished or self.done(window):
                report(window.lengths, True)
                continue
            failures = dict(window.faults)
            with closing(ahead(compute(window, failures), BATCHES_AHEAD)) as batches:
                self.write(window, _reported(window, batches, report), failures)
        if last is None:
            raise ValueError("expected at least one protein to embed, got none")
        return self.finish(last.number + 1, last.checksum, last.kind)

    def finish(self, windows: int, checksum: str, kind: str = "sequences") -> dict[str, Failure]:
        """Makes the store of its windows; lists and returns what could not be embedded.

        Args:
            windows: how many there are, all of them done.
            checksum: of the last one.
            kind: what their contents are called.

        Raises:
            ValueError: for another number of windows, or another checksum, than the store was begun with.
        """
        if self.is_finished:
            if checksum != self._checksum:
                raise ValueError(
                    f"expected the {kind} of which {self.path} is, got others: take another output"
                )
            self._leave()
            return self._listed()
        if self.said(windows).is_file():
            raise ValueError(
                f"expected the {kind} with which {self.path} was begun, got fewer: take those, or "
                "another output"
            )
        failures = {name: why for done in self.all(windows) for name, why in done.failures.items()}
        write_failures(self.failed, failures.items())
        self.format.finish(self.folder / "data", self.names(windows), self.facts, checksum, self.path)
        sync(self.path.parent)
        self._leave()
        return failures

    def _listed(self) -> dict[str, Failure]:
        """What the file beside the store lists."""
        if not self.failed.is_file():
            return {}
        with self.failed.open(newline="", encoding="utf-8") as handle:
            lines = csv.DictReader(handle, delimiter="\t")  # earlier versions named no file and no line
            return {
                each["identifier"]: Failure(
                    int(each["residues"]), each["reason"], each.get("file", ""), int(each.get("line") or 0)
                )
                for each in lines
            }

    @property
    def failed(self) -> Path:
        """Where records that could not be embedded are listed."""
        return self.path.with_name(f"{self.path.name}.failed.tsv")

    def _leave(self) -> None:
        """Removes the folder of the work."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Gives the lock back; what is done stays for the next time."""
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_failures(path: Path, failures: Collection[tuple[str, Failure]]) -> None:
    """Writes the list of records that could not be embedded, as a table; removes it where there are none."""
    path.unlink(missing_ok=True)
    if failures:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
            lines = csv.writer(handle, delimiter="\t", lineterminator="\n")
            lines.writerow(_COLUMNS)
            lines.writerows(
                (name, why.residues, why.reason, why.source, why.line or "") for name, why in failures
            )


def locked(folder: Path, path: Path) -> FileLock:
    """The lock of the folder in which `path` is worked on; it ends with the process, or where it is released.

    Raises:
        BlockingIOError: when another process has it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"expected to write {path} alone, got another process that does: wait for it"
        ) from None
    return lock


def in_residues(progress: Progress) -> Report:
    """What counts the residues of records that are done."""
    return lambda lengths, before: progress(sum(filter(None, lengths)), before)


def _reported(window: Window[Any], batches: Iterable[list[Row]], report: Report) -> Iterator[Row]:
    """The rows of a window; says which have come."""
    for rows in batches:
        yield from rows
        report([window.lengths[place] for place, _ in rows], False)


def _opened(form: Format, path: Path) -> Store:
    """The finished store at a path; raises a ValueError for anything else."""
    wanted = f"expected nothing or an embedding of rd_torch's at {path}"
    try:
        store = form.open(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{wanted}, got something else: take another output ({error})") from error
    if store.facts is None:
        store.close()
        raise ValueError(f"{wanted}, got another program's: take another output")
    return store
