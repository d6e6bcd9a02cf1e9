"""Files on this machine and in a store: written whole or not at all, listed in order, named without leaving."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.locations import open_folder, storage_of
from qwen_vl_classifier.files.paths import local_path
from qwen_vl_classifier.files.storage import LocalStorage
from qwen_vl_classifier.files.whole import partial_name


@pytest.fixture(params=["path", "file://", "memory://"])
def location(request, tmp_path) -> str:
    """A folder that is not there yet, in each kind of place."""
    if request.param == "memory://":
        return f"memory://{uuid.uuid4().hex}/out"
    return ("" if request.param == "path" else "file://") + str(tmp_path / "deep" / "out")


def test_what_is_written_is_read_again(location):
    folder = open_folder(location)
    folder.write("manifest.json", b"{}")
    folder.write("shards/000000.parquet", lambda file: file.write(b"scores"))
    folder.write("manifest.json", b"{1}")
    assert folder.read("manifest.json") == b"{1}"
    assert folder.read("shards/000000.parquet") == b"scores"
    assert folder.is_local == ("memory" not in location)


def test_names_are_in_order_and_by_prefix(location):
    folder = open_folder(location)
    assert list(folder.names()) == []
    for name in ("shards/10", "shards/9", "a", "shards.txt", "b/c/d"):
        folder.write(name, b"")
    assert list(folder.names()) == ["a", "b/c/d", "shards/10", "shards/9", "shards.txt"]
    assert list(folder.names("shards/")) == ["shards/10", "shards/9"]
    assert list(folder.names("shards/1")) == ["shards/10"]
    assert list(folder.names("b/c/")) == ["b/c/d"]
    assert list(folder.names("nothing/")) == []


def test_the_first_writer_wins_where_that_is_asked(location):
    folder = open_folder(location)
    folder.write("settled", b"first", once=True)
    with pytest.raises(FileExistsError):
        folder.write("settled", b"second", once=True)
    assert folder.read("settled") == b"first"
    assert list(folder.names()) == ["settled"]


def test_one_of_many_writers_wins(tmp_path):
    """Stores promise that themselves; fsspec's stand-in in memory does not, between threads."""
    folder = open_folder(tmp_path)
    folder.write("other", b"")
    outcomes = []

    def write(content: bytes) -> None:
        try:
            folder.write("settled", content, once=True)
            outcomes.append(content)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [folder.read("settled")]


def test_what_is_removed_is_gone(location):
    folder = open_folder(location)
    folder.write("a", b"x")
    folder.remove("a")
    folder.remove("a")
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_a_writer_that_fails_leaves_nothing(location):
    folder = open_folder(location)
    folder.write("a", b"before")

    def failing(file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        folder.write("a", failing)
    assert folder.read("a") == b"before"
    assert list(folder.names()) == ["a"]


def test_what_a_kill_left_is_hidden_and_swept(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("shards/0", b"x")
    left = tmp_path / "shards" / partial_name("1")
    left.write_bytes(b"half")
    (tmp_path / ".hidden").write_bytes(b"not ours")
    assert list(folder.names()) == [".hidden", "shards/0"]
    folder.sweep()
    assert not left.exists()
    assert (tmp_path / ".hidden").exists()


def test_what_a_kill_left_of_one_file_is_swept_alone(tmp_path):
    folder = open_folder(tmp_path)
    for name in ("shards/1", "shards/10", "shards/1.x"):
        folder.write(name, b"x")
        (tmp_path / "shards" / partial_name(name.removeprefix("shards/"))).write_bytes(b"half")
    (tmp_path / partial_name("1")).write_bytes(b"half")
    folder.sweep("shards/1")
    left = [path.name.split(".")[1] for path in tmp_path.rglob("*.partial")]
    assert sorted(left) == ["1", "1", "10"]  # one of another folder, one of "1.x"
    folder.sweep("1")
    assert [path.parent.name for path in tmp_path.rglob("*.partial")] == ["shards", "shards"]
    assert list(folder.names()) == ["shards/1", "shards/1.x", "shards/10"]


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a//b", "", ".", "a/./b", "a\0"])
def test_names_stay_in_the_folder(location, name):
    folder = open_folder(location)
    for act in (folder.read, folder.remove, lambda name: folder.write(name, b"")):
        with pytest.raises(ValueError, match="is not the name of a file"):
            act(name)


def test_a_file_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda *paths: (happened.append("rename"), replace(*paths))[1])
    open_folder(tmp_path).write("a", b"x")
    assert happened == ["fsync", "rename", "fsync"]  # the file, its name, the folder


def test_without_hard_links_the_first_writer_wins_too(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    folder = open_folder(tmp_path)
    folder.write("a", b"first", once=True)
    with pytest.raises(FileExistsError):
        folder.write("a", b"second", once=True)
    assert (list(folder.names()), folder.read("a")) == (["a"], b"first")


def test_entries_tell_links_and_others_apart(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"123")
    (tmp_path / "c").symlink_to("b")
    (tmp_path / "d").symlink_to("a.txt")
    (tmp_path / "e").symlink_to("e")
    found = [(entry.name, entry.kind, entry.size) for entry in LocalStorage().entries(str(tmp_path))]
    assert found == [
        ("a.txt", "file", 3),
        ("b", "folder", 0),
        ("c", "linked folder", 0),
        ("d", "file", 3),
        ("e", "other", 0),
    ]


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("file:///a/b", "/a/b"),
        ("FILE://localhost/a b", "/a b"),
        ("/a/file:///b", "/a/file:///b"),
        ("s3://a/b", "s3://a/b"),
        ("file:a", "file:a"),
    ],
)
def test_file_urls_are_paths(location, path):
    assert local_path(location) == path


@pytest.mark.parametrize("location", ["https://host/a", "data:text/plain,x", "simplecache::s3://a/b", "gopher://a/b"])
def test_what_is_no_store_is_refused(location):
    with pytest.raises(ConfigError, match="is not a supported store"):
        storage_of(location)
