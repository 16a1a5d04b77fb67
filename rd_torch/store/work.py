"""A store that is being written: which windows are done, and the folder where they lie until all are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from rd_torch.disk import Lock, busy_error, is_held, require_folder, sync, take_lock, write_whole
from rd_torch.store.facts import Facts
from rd_torch.store.failures import read_failures, write_failures
from rd_torch.store.folder import Done, Failure, Folder
from rd_torch.store.format import Format, Row, require_fitting
from rd_torch.store.shards import Shard
from rd_torch.store.store import Store
from rd_torch.store.windows import Content, Length, Window
from rd_torch.threads import run_ahead

Compute: TypeAlias = Callable[[Window[Content], dict[int, str]], Iterable[list[Row]]]

Report: TypeAlias = Callable[[list[Length], bool], object]
"""Called with the lengths of records that are done, and whether they were so before."""

ProgressCallback: TypeAlias = Callable[[int, bool], object]
"""Called with how much is done, and whether it was so before."""

PATIENCE: Final = 600.0
"""Seconds that a shard waits for another one that begins a store or puts it together."""

BATCHES_AHEAD: Final = 2
"""Batches that are computed while one is written."""


class Work(Folder):
    """The folder `<output>.part` under a lock, which becomes the store when its last window is done.

    Shards each hold a lock of their own, and the folder's only while one begins or puts the store together,
    which the last one that ends does.

    Args:
        path: the store.
        form: its format.
        facts: what it is of.
        fixed_budget: whether `tokens_per_batch` must be the recorded one; else the recorded one counts.
        shard: which windows are written here; None for all.

    Raises:
        FileNotFoundError: when the store's folder is not there.
        BlockingIOError: when another process writes the store, or the same shard of it.
        ValueError: for a dtype or pooling that the format does not take, when something else is there, or a
            store of other facts.
    """

    def __init__(
        self,
        path: Path,
        form: Format,
        facts: Facts,
        *,
        fixed_budget: bool = False,
        shard: Shard | None = None,
    ) -> None:
        require_fitting(form, facts)
        require_folder(path)
        super().__init__(path, form, facts)
        self._checksum: str | None = None
        self._shard, self._fixed_budget = shard, fixed_budget
        self._go_on()
        self._lock: Lock | None = None if self.is_finished else self._taken()

    @property
    def is_finished(self) -> bool:
        """Whether the store is there already; nothing is written then."""
        return self._checksum is not None

    def _go_on(self) -> None:
        """Takes the facts of what was begun, if they fit."""
        begun = self._begun()
        if begun is None:
            return
        self.facts.require_same(begun, str(self.path))
        if self._fixed_budget and self.facts.tokens_per_batch != begun.tokens_per_batch:
            raise ValueError(
                f"expected tokens_per_batch {begun.tokens_per_batch}, with which {self.path} was begun, got "
                f"{self.facts.tokens_per_batch}: leave it out, or take another output"
            )
        self.facts = begun

    def _begun(self) -> Facts | None:
        """The facts of the finished or unfinished store, if there is one."""
        if self.path.exists():
            with _opened(self.format, self.path) as store:
                self._checksum = store.checksum
                return store.facts
        said = self.folder / "facts.json"
        return Facts.from_json(said.read_text()) if said.is_file() else None

    def _taken(self) -> Lock | None:
        """Makes the folder and takes its lock, or the shard's; none where the store is there by then."""
        for name in ("data", "windows"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self._shard is None:
            lock = take_lock(self.folder, self.path)
            if self._others():
                lock.release()
                raise busy_error(self.path)
        else:
            lock = take_lock(self.folder, self.path, wait=PATIENCE)
            self._go_on()  # another one may have begun it, or finished it, meanwhile
            if self.is_finished:
                self._sweep(lock)
                return None
        write_whole(self.folder / "facts.json", lambda part: part.write_text(self.facts.to_json()))
        if self._shard is None:
            return lock
        try:
            return take_lock(self.folder, self.path, f"{self._shard.number}-of-{self._shard.total}.shard")
        finally:
            lock.release()

    def _others(self) -> list[Path]:
        """The locks of shards that are at work."""
        return [path for path in self.folder.glob("*.shard") if is_held(path)]

    def _sweep(self, lock: Lock) -> None:
        """Removes what waiting for the lock has left of the folder of a store that is finished."""
        lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(
        self, windows: Iterable[Window[Content]], compute: Compute[Content] | None, report: Report
    ) -> dict[str, Failure]:
        """Computes and writes what is not done and, unless other shards have still to, finishes the store.

        Batches are computed in a thread of its own while those before them are written, and a window only
        when the one before it is done: so no more than one window is ever lost.

        Args:
            windows: all of them, in order.
            compute: embeds a window, batch by batch; takes what cannot be embedded, by place with the
                reason, into the dictionary. None where all windows are done and only to be put together.
            report: called with the lengths of records that are done, and whether they were so before.

        Returns:
            The records that could not be embedded, by name; where the store is not finished, this shard's.

        Raises:
            ValueError: for no windows, others than the store was begun with, or some that are not done where
                they are only to be put together.
        """
        last: Window[Any] | None = None
        for window in windows:
            last = window
            is_others = self._shard is not None and not self._shard.takes(window.number)
            if self.is_finished or self.done(window) or is_others:
                report(window.lengths, True)
                continue
            if compute is None:
                raise ValueError(
                    f"expected all windows of {self.path} to be done, got number {window.number + 1:,} that "
                    f"is not, with {window.names[0]!r} and what follows it: run its shard again first"
                )
            failures = dict(window.faults)
            with closing(run_ahead(compute(window, failures), BATCHES_AHEAD)) as batches:
                rows = _reported(window, batches, report)
                self.write(window, rows, failures, apart=self._shard is not None)
        if last is None:
            raise ValueError("expected at least one protein to embed, got none")
        if self._shard is None or self.is_finished:
            return self.finish(last.number + 1, last.checksum, last.kind)
        mine = self._failures(filter(self._shard.takes, range(last.number + 1)))
        if self._is_last(last.number + 1):
            return self.finish(last.number + 1, last.checksum, last.kind)
        return mine

    def _is_last(self, windows: int) -> bool:
        """Whether nobody else is at work and nothing is left to do; the folder's lock is then held.

        The shard's own lock is given back first: of two that end together, the second one to come finds
        neither.
        """
        self.close()
        self._lock = lock = take_lock(self.folder, self.path, wait=PATIENCE)
        if self.path.exists():
            self._sweep(lock)
            return False
        if self._others() or not all(self.said(number).is_file() for number in range(windows)):
            lock.release()
            return False
        return True

    def _failures(self, numbers: Iterable[int]) -> dict[str, Failure]:
        """What could not be embedded of windows that are done."""
        said = (Done.from_json(self.said(number).read_text()) for number in numbers)
        return {name: why for done in said for name, why in done.failures.items()}

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
            return read_failures(self.failed)
        if self.said(windows).is_file():
            raise ValueError(
                f"expected the {kind} with which {self.path} was begun, got fewer: take those, or "
                "another output"
            )
        failures = self._failures(range(windows))
        write_failures(self.failed, failures.items())
        self.format.finish(self.folder / "data", self.names(windows), self.facts, checksum, self.path)
        sync(self.path.parent)
        self._leave()
        return failures

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


def in_residues(progress: ProgressCallback) -> Report:
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
