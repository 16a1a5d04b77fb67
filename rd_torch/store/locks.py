"""Locks of a folder that is worked on; they end with the process that holds them, however it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

LOCK: Final = "lock"
"""The file by which a whole folder is held."""


def locked(folder: Path, path: Path, name: str = LOCK, *, wait: float = 0) -> FileLock:
    """The lock of the folder in which `path` is worked on; it ends with the process, or where it is released.

    Args:
        folder: where the lock lies.
        path: what is worked on.
        name: of the lock.
        wait: seconds to wait for it.

    Raises:
        BlockingIOError: when another process has it.
    """
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise busy(path) from None
    return lock


def busy(path: Path) -> BlockingIOError:
    """What is raised where somebody else writes."""
    return BlockingIOError(f"expected to write {path} alone, got another process that does: wait for it")


def is_held(path: Path) -> bool:
    """Whether a process holds the lock."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
