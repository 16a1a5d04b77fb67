"""Files that are whole or not there, and locks that end with the process that holds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from filelock import FileLock, Timeout

Lock: TypeAlias = FileLock
"""A lock that is held until it is released, nothing refers to it, or the process ends, however it ends."""

LOCK: Final = "lock"
"""Name of the file by which a process holds a whole folder."""


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Write a file under another name beside its own, then rename it.

    A reader, or a later run after a kill, finds the whole file or none. The other name lies in the same
    folder, because renaming is one step only within a file system. A file of that name is replaced at the
    end and not written over, so that tensors may be written that are mapped from it.

    Args:
        path: the file.
        write: is called with the path that it has to write to.
        durable: wait until the disk has the file, so that it outlives a power cut.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        if durable:
            sync(part)
        move(part, path, durable=durable)
    finally:
        part.unlink(missing_ok=True)


def move(source: Path, target: Path, *, durable: bool = True) -> None:
    """Give a whole file or folder its final name, in the same file system; a file of that name is replaced.

    Args:
        source: the file or folder.
        target: where it is afterwards.
        durable: wait until the disk has the new name.
    """
    source.replace(target)
    if durable:
        sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names that were given in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_folder(path: Path) -> Path:
    """Return the folder `<output>.part` beside an output, in which work on it lies until it is whole."""
    return path.with_name(f"{path.name}.part")


def require_folder(path: Path) -> None:
    """Refuse to go on where the folder of a file that will be written does not exist.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: where there is no folder for it.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder {path.parent} to write to, got nothing there")


def take_lock(folder: Path, path: Path, name: str = LOCK, *, wait: float = 0) -> Lock:
    """Take a lock in the folder in which a process works on a path.

    Args:
        folder: where the file of the lock lies.
        path: what is worked on; the error names it.
        name: name of the lock's file.
        wait: seconds to wait for another process to release it.

    Returns:
        The lock, which the caller releases.

    Raises:
        BlockingIOError: when another process has it.
    """
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise BlockingIOError(busy_message(path)) from None
    return lock


def is_held(path: Path) -> bool:
    """Whether a process holds the lock whose file lies at a path."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def busy_message(path: Path) -> str:
    """Return what an error says where another process writes to a path."""
    return f"expected to write {path} alone, got another process that does: wait for it"
