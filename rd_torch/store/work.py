"""`Work`: a store that is being written, from the first window until the store is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from rd_torch.disk import Lock, busy_message, is_held, move, require_folder, take_lock, write_whole
from rd_torch.store.facts import Facts
from rd_torch.store.failures import Failure, failure_list, read_failures, write_failures
from rd_torch.store.folder import FACTS_FILE, Folder
from rd_torch.store.format import Format, Row, require_fitting
from rd_torch.store.opening import open_finished
from rd_torch.store.shards import Shard
from rd_torch.store.windows import Content, Length, Window, count_residues
from rd_torch.threads import run_ahead

Compute: TypeAlias = Callable[[Window[Content], dict[int, str]], Iterable[list[Row]]]
"""Embeds a window batch by batch.

It enters the records that it cannot embed into the dictionary: the reason by the place in the window.
"""

ProgressCallback: TypeAlias = Callable[[int, bool], object]
"""Is called with how much more is done, and whether it was done before this run."""

PATIENCE: Final = 600.0
"""Seconds that a shard waits while another one begins the store or puts it together."""

BATCHES_AHEAD: Final = 2
"""Number of batches that are computed while one is written."""


class Work(Folder):
    """The folder `<output>.part` under a lock; it becomes the store when the last window is done.

    A process that works alone holds the lock of the folder. Each shard holds a lock of its own, and that of
    the folder only while it begins the store or puts it together. The last shard to end puts it together.

    Args:
        path: the store.
        form: its format.
        facts: what is embedded with what.
        fixed_budget: if true, refuse a store that was begun with another `tokens_per_batch`; if false, use
            the one it was begun with.
        shard: the share of the windows that is written here; None for all of them.

    Attributes:
        facts: what is embedded with what; of a store that was begun before, the facts that stand in it.

    Raises:
        FileNotFoundError: where the folder that the store will lie in does not exist.
        BlockingIOError: where another process writes the store, or the same shard of it.
        ValueError: for a type of number or a way to pool that the format does not hold, and where a store of
            other facts, or something that is no store of ours, is at the path.
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
        self._adopt_facts()
        self._lock: Lock | None = None if self.is_finished else self._begin()

    @property
    def is_finished(self) -> bool:
        """Whether the store was there before; nothing is written then."""
        return self._checksum is not None

    def _adopt_facts(self) -> None:
        """Take over the facts of a store that was begun, if there is one and they fit."""
        begun = self._read_facts()
        if begun is None:
            return
        self.facts.require_same(begun, self.path)
        if self._fixed_budget and self.facts.tokens_per_batch != begun.tokens_per_batch:
            raise ValueError(
                f"expected tokens_per_batch {begun.tokens_per_batch}, with which {self.path} was begun, got "
                f"{self.facts.tokens_per_batch}: leave it out, or choose another output"
            )
        self.facts = begun

    def _read_facts(self) -> Facts | None:
        """Read the facts of the finished or unfinished store, if there is one."""
        if self.path.exists():
            with open_finished(self.format, self.path) as store:
                self._checksum = store.checksum
                return store.facts
        file = self.folder / FACTS_FILE
        return Facts.from_json(file.read_text()) if file.is_file() else None

    def _begin(self) -> Lock | None:
        """Make the folder and take its lock or the shard's.

        Returns:
            The lock; None where another shard has finished the store meanwhile.

        Raises:
            BlockingIOError: where another process writes the store, or the same shard of it.
        """
        for name in ("data", "windows"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self._shard is None:
            lock = take_lock(self.folder, self.path)
            if self._busy_shards():
                lock.release()
                raise BlockingIOError(busy_message(self.path))
        else:
            lock = take_lock(self.folder, self.path, wait=PATIENCE)
            self._adopt_facts()  # another shard may have begun or finished the store while this one waited
            if self.is_finished:
                self._remove_leftovers(lock)
                return None
        write_whole(self.folder / FACTS_FILE, lambda part: part.write_text(self.facts.to_json()))
        if self._shard is None:
            return lock
        try:
            return take_lock(self.folder, self.path, f"{self._shard.number}-of-{self._shard.total}.shard")
        finally:
            lock.release()

    def _busy_shards(self) -> list[Path]:
        """Return the locks of shards that are at work now."""
        return [path for path in self.folder.glob("*.shard") if is_held(path)]

    def _remove_leftovers(self, lock: Lock) -> None:
        """Remove the folder that waiting for its lock has made again beside a finished store."""
        lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(
        self,
        windows: Iterable[Window[Content]],
        compute: Compute[Content] | None,
        progress: ProgressCallback,
        count: Callable[[list[Length]], int] = count_residues,
    ) -> dict[str, Failure]:
        """Embed and write the windows that are not done, then finish the store unless other shards have to.

        A thread computes batches while those before them are written. It begins a window only when the one
        before it is done, so that a kill never loses more than one window.

        Args:
            windows: all windows of the store, in order.
            compute: embeds a window; None where all windows are done and have only to be put together.
            progress: is called with how much more is done, and whether it was done before this run.
            count: how much is done when records of these lengths are; by default the number of their
                residues.

        Returns:
            The records that could not be embedded, by name; where other shards have still to finish the
            store, those of this shard.

        Raises:
            ValueError: for no windows, for other windows than the store was begun with, or, without
                `compute`, where one is not done.
        """
        last: Window[Any] | None = None
        for window in windows:
            last = window
            of_another = self._shard is not None and not self._shard.takes(window.number)
            if self.is_finished or self.find_done(window) or of_another:
                progress(count(window.lengths), True)
                continue
            if compute is None:
                raise ValueError(
                    f"expected all windows of {self.path} to be done, got number {window.number + 1:,} that "
                    f"is not, with {window.names[0]!r} and what follows it: run its shard again first"
                )
            failures = dict(window.faults)
            with closing(run_ahead(compute(window, failures), BATCHES_AHEAD)) as batches:
                rows = _report_rows(window, batches, lambda lengths: progress(count(lengths), False))
                self.write(window, rows, failures, apart=self._shard is not None)
        if last is None:
            raise ValueError("expected at least one protein to embed, got none")
        if self._shard is None or self.is_finished:
            return self.finish(last.number + 1, last.checksum, last.kind)
        mine = self._read_failures(filter(self._shard.takes, range(last.number + 1)))
        if self._take_over(last.number + 1):
            return self.finish(last.number + 1, last.checksum, last.kind)
        return mine

    def _take_over(self, windows: int) -> bool:
        """Take the folder's lock to put the store together, if all windows are done and nobody is at work.

        The shard's own lock is released first. Of two shards that end together, the second one to come then
        finds no other at work, and one of them puts the store together.

        Args:
            windows: number of windows of the store.

        Returns:
            Whether the folder's lock is held now.
        """
        self.close()
        self._lock = lock = take_lock(self.folder, self.path, wait=PATIENCE)
        if self.path.exists():
            self._remove_leftovers(lock)
            return False
        if self._busy_shards() or not all(self.done_file(number).is_file() for number in range(windows)):
            lock.release()
            return False
        return True

    def _read_failures(self, numbers: Iterable[int]) -> dict[str, Failure]:
        """Read which records of windows that are done could not be embedded."""
        return {name: why for done in self.read_done(numbers) for name, why in done.failures.items()}

    def finish(self, windows: int, checksum: str, kind: str = "sequences") -> dict[str, Failure]:
        """Make the store of its windows, and list the records that could not be embedded beside it.

        Args:
            windows: number of windows, all of which are done.
            checksum: checksum of the last window.
            kind: what the contents of windows are called in errors.

        Returns:
            The records that could not be embedded, by name.

        Raises:
            ValueError: for fewer windows than the store was begun with, or another checksum.
        """
        if self.is_finished:
            if checksum != self._checksum:
                raise ValueError(
                    f"expected the {kind} with which {self.path} was made, got others: choose another output"
                )
            self._remove_folder()
            return read_failures(failure_list(self.path))
        if self.done_file(windows).is_file():
            raise ValueError(
                f"expected the {kind} with which {self.path} was begun, got fewer: use those, or "
                "choose another output"
            )
        failures = self._read_failures(range(windows))
        write_failures(failure_list(self.path), failures.items())
        whole = self.format.finish(self.folder / "data", self.locate_records(windows), self.facts, checksum)
        move(whole, self.path)
        self._remove_folder()
        return failures

    def _remove_folder(self) -> None:
        """Release the lock and remove the folder in which the store was written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Release the lock; the windows that are done stay for the next run."""
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _report_rows(
    window: Window[Any], batches: Iterable[list[Row]], report: Callable[[list[Length]], object]
) -> Iterator[Row]:
    """Yield the rows of a window; report the lengths of their records after each batch."""
    for rows in batches:
        yield from rows
        report([window.lengths[place] for place, _ in rows])
