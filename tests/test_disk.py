"""Files that are whole or not there, and locks."""

import errno
import multiprocessing
import os
import signal
import stat

import pytest

from rd_torch.disk import (
    LOCK,
    is_held,
    move,
    part_folder,
    require_folder,
    sync,
    take_lock,
    write_whole,
)


@pytest.fixture
def synced(monkeypatch):
    """What was waited for: whether each was a folder."""
    seen, fsync = [], os.fsync

    def noted(handle):
        seen.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return seen


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path, synced, durable):
    path = tmp_path / "file"
    path.write_text("old")

    def write(part):
        assert part.parent == path.parent
        part.write_text("ne")
        assert path.read_text() == "old"
        part.write_text("new")

    write_whole(path, write, durable=durable)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    assert synced == ([False, True] if durable else [])


@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path, before):
    path = tmp_path / "file"
    if before:
        path.write_text(before)

    def write(part):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        write_whole(path, write)
    assert [each.read_text() for each in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("durable", [True, False])
def test_files_and_folders_are_moved_and_the_disk_has_their_new_names(tmp_path, synced, durable):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").write_text("whole")
    (tmp_path / "file").write_text("old")
    move(tmp_path / "from" / "file", tmp_path / "file", durable=durable)
    move(tmp_path / "from", tmp_path / "to", durable=durable)
    assert (tmp_path / "file").read_text() == "whole"
    assert not any((tmp_path / "to").iterdir())
    assert synced == ([True, True] if durable else [])


def test_what_is_not_there_cannot_be_synced(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "file")


def test_a_file_needs_a_folder_and_has_a_folder_for_its_parts_beside_it(tmp_path):
    require_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="expected a folder .*nowhere to write to, got nothing there"):
        require_folder(tmp_path / "nowhere" / "file")
    assert part_folder(tmp_path / "out.h5") == tmp_path / "out.h5.part"


def test_a_lock_is_taken_once_until_it_is_released(tmp_path):
    lock = take_lock(tmp_path, tmp_path / "out.h5")
    other = take_lock(tmp_path, tmp_path / "out.h5", "1-of-2.shard")
    assert is_held(tmp_path / LOCK)
    for wait in (0, 0.1):
        with pytest.raises(BlockingIOError, match="expected to write .*out.h5 alone, got another process"):
            take_lock(tmp_path, tmp_path / "out.h5", wait=wait)
    lock.release()
    assert not is_held(tmp_path / LOCK)
    assert is_held(tmp_path / "1-of-2.shard")
    other.release()
    take_lock(tmp_path, tmp_path / "out.h5").release()


def hold(folder, ready):
    """Takes the lock and never gives it back."""
    lock = take_lock(folder, folder / "out.h5")
    ready.set()
    signal.pause()
    lock.release()


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    assert is_held(tmp_path / LOCK)
    process.kill()
    process.join()
    assert not is_held(tmp_path / LOCK)
    take_lock(tmp_path, tmp_path / "out.h5").release()
