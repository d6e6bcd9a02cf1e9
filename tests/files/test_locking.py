"""The lock of a folder: one run at a time, and only the folder that was locked."""

import errno
import fcntl
import os
import shutil

import pytest

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.locking import FolderLock


@pytest.fixture
def lock(tmp_path):
    lock = FolderLock(tmp_path / "deep" / "out")
    lock.take()
    yield lock
    lock.release()


def test_one_run_at_a_time_has_a_folder(lock, tmp_path):
    other = FolderLock(tmp_path / "deep" / "out")
    with pytest.raises(ConfigError, match=rf"another run is writing here \(process {os.getpid()} on [\w.-]+\); wait"):
        other.take()
    assert lock.is_held()
    lock.release()
    other.take()
    assert (lock.is_held(), other.is_held()) == (False, True)
    other.release()


def test_workers_ask_for_the_run_that_has_the_folder(lock, tmp_path):
    assert FolderLock(tmp_path / "deep" / "out", lock.run).is_held()
    assert not FolderLock(tmp_path / "deep" / "out", "0" * 32).is_held()


def remove(folder):
    shutil.rmtree(folder)


def make_anew(folder):
    shutil.rmtree(folder)
    FolderLock(folder).take()


def copy(folder):
    folder.rename(folder.with_name("moved"))
    shutil.copytree(folder.with_name("moved"), folder)


def replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


def damage(folder):
    (folder / ".lock").write_bytes(bytes(10_000))


def put_a_link(folder):
    (folder / ".lock").rename(folder.parent / "elsewhere")
    (folder / ".lock").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("change", [remove, make_anew, copy, replace_by_a_file, damage, put_a_link])
def test_a_run_notices_that_its_folder_is_another(lock, tmp_path, change):
    change(tmp_path / "deep" / "out")
    assert not lock.is_held()


def test_a_folder_that_is_made_anew_while_it_is_being_locked_is_locked_again(tmp_path, monkeypatch):
    out, opened, open_file = tmp_path / "out", [], os.open

    def anew(path, flags, *arguments):
        descriptor = open_file(path, flags, *arguments)
        opened.append(path)
        if len(opened) == 1:
            out.rename(tmp_path / "before")
            out.mkdir()
        return descriptor

    monkeypatch.setattr(os, "open", anew)
    lock = FolderLock(out)
    lock.take()
    monkeypatch.undo()
    assert len(opened) == 2
    assert lock.is_held()
    with pytest.raises(ConfigError, match="another run is writing here"):
        FolderLock(out).take()
    lock.release()


def test_without_locks_the_last_run_that_begins_has_the_folder(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, last = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    last.take()
    assert (first.is_held(), last.is_held()) == (False, True)
    first.release()
    last.release()


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder", "other content", "device"])
def test_a_lock_that_is_none_is_refused_and_left_alone(tmp_path, kind):
    victim, lock = tmp_path / "victim", tmp_path / "out" / ".lock"
    victim.write_text("precious")
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "dangling link":
        lock.symlink_to(tmp_path / "new")
    elif kind == "hard link":
        lock.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "device":
        lock.symlink_to("/dev/full")
    else:
        lock.write_text("mine")
    with pytest.raises(ConfigError, match=r"its \.lock was not written by a run \(it may be a link\); remove it"):
        FolderLock(lock.parent).take()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    assert kind != "other content" or lock.read_text() == "mine"
