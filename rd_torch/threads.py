"""Work that is done in a thread of its own, ahead of whoever waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def run_ahead(items: Iterable[Item], most: int) -> Generator[Item, None, None]:
    """Make items in a thread of their own, which is ahead of their use, and yield them in order.

    An error in the thread is raised here, after the items that were made before it. A generator that is
    closed before its end waits until the thread has made the item that it is at.

    Args:
        items: iterated over in the thread.
        most: number of items that are made before they are asked for.

    Yields:
        The same items.
    """
    made: queue.Queue[Item | BaseException | None] = queue.Queue(most)
    wanted = threading.Event()
    wanted.set()

    def put(item: Item | BaseException | None) -> bool:
        """Wait for room; False where nobody wants more."""
        while wanted.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        """Make the items; the last one in the queue is an error that was raised, or None."""
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:  # raised where the items are wanted
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        wanted.clear()
        thread.join()
