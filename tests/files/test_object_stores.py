"""Stores by URL: what is put is whole, what fails names no secret, what is found has a URL of its own."""

from __future__ import annotations

import importlib
import re
import traceback
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qwen_vl_classifier.errors import ConfigError, MissingExtraError
from qwen_vl_classifier.extras import install_command
from qwen_vl_classifier.files.locations import open_folder
from qwen_vl_classifier.files.object_stores import UrlStorage

SECRET = "AKIA-SECRET"


class Renaming(MemoryFileSystem):
    """A store with folders and renames, that shows files while they are written."""

    protocol = "smb"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    calls: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("smb://").strip("/")

    def pipe_file(self, path, value, mode="overwrite", **options):
        self.calls.append(("put", path))
        super().pipe_file(path, value, mode, **options)

    def mv(self, path1, path2, **options):
        self.calls.append(("rename", path1, path2))
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, **options)


@pytest.fixture
def renaming(monkeypatch) -> str:
    """A folder in such a store."""
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "smb", Renaming)
    Renaming.clear_instance_cache()
    Renaming.calls.clear()
    Renaming.store.clear()
    return "smb://host/share"


@pytest.fixture
def bucket() -> str:
    """An empty bucket in memory."""
    return f"memory://{uuid.uuid4().hex}"


def test_an_object_is_put_once_under_its_own_name(bucket, monkeypatch):
    puts = []
    pipe_file = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "pipe_file",
        lambda self, path, value, **options: (puts.append((path, value)), pipe_file(self, path, value, **options))[1],
    )
    open_folder(bucket).write("shards/0", lambda file: [file.write(b"a"), file.write(b"b")])
    assert [(path.rpartition("/")[2], value) for path, value in puts] == [("0", b"ab")]


def test_a_store_that_says_in_its_own_words_that_a_key_is_taken(bucket, monkeypatch):
    folder = open_folder(bucket)
    folder.write("a", b"first")

    def failing(*_: object, **__: object) -> None:
        raise OSError("PreconditionFailed")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    with pytest.raises(FileExistsError):
        folder.write("a", b"second", once=True)
    with pytest.raises(OSError, match="Input/output error"):
        folder.write("b", b"first", once=True)


def test_where_there_are_renames_a_file_is_renamed(renaming):
    folder = open_folder(renaming)
    folder.write("shards/0", b"x")
    (_, partial), (_, source, target) = Renaming.calls
    assert partial == source != target == "/host/share/shards/0"
    assert (list(folder.names()), folder.read("shards/0")) == (["shards/0"], b"x")
    with pytest.raises(FileExistsError):
        folder.write("shards/0", b"y", once=True)
    folder.write("shards/0", b"z")
    assert (list(folder.names()), folder.read("shards/0")) == (["shards/0"], b"z")


def test_a_rename_that_fails_leaves_nothing(renaming, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Renaming, "mv", failing)
    with pytest.raises(OSError, match="RuntimeError"):
        open_folder(renaming).write("a", b"x")
    assert Renaming.store == {}


def test_what_fails_names_no_secret(bucket, monkeypatch):
    storage = UrlStorage(bucket, {})

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError(f"request signed with {SECRET} failed")

    for name in ("info", "ls", "find", "glob", "open", "cat_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, failing)
    url = f"{bucket}/a"
    for act in (
        lambda: storage.entry(url),
        lambda: storage.entries(url),
        lambda: list(storage.tree(url)),
        lambda: storage.glob(url + "*"),
        lambda: storage.open(url),
        lambda: storage.read(url),
        lambda: storage.write(url, b""),
        lambda: storage.remove(url),
    ):
        with pytest.raises(OSError, match=r"Input/output error, RuntimeError") as caught:
            act()
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_breaks_off_names_no_secret(bucket):
    storage = UrlStorage(bucket, {})
    storage.write(f"{bucket}/a", b"x" * 10)
    file = storage.open(f"{bucket}/a")
    raw = file.raw._file

    class Broken:
        def read(self, size: int) -> bytes:
            raise RuntimeError(SECRET)

        close = raw.close

    file.raw._file = Broken()
    with file, pytest.raises(OSError, match="RuntimeError") as caught:
        file.read()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_files_are_read_from_anywhere(bucket):
    storage = UrlStorage(bucket, {})
    storage.write(f"{bucket}/a", b"one\ntwo\nthree")
    with storage.open(f"{bucket}/a") as file:
        file.seek(4)
        assert list(file) == [b"two\n", b"three"]
        assert (file.seek(-5, 2), file.read()) == (8, b"three")
    assert storage.read(f"{bucket}/a", 3) == b"one"


def test_what_is_found_has_its_url(bucket):
    storage = UrlStorage(bucket, {})
    for name in ("x/b.jsonl", "x/a.jsonl", "x/deep/c.jsonl", "y.csv"):
        storage.write(f"{bucket}/{name}", b"12")
    assert storage.glob(f"{bucket}/x/*.jsonl") == [f"{bucket}/x/a.jsonl", f"{bucket}/x/b.jsonl"]
    assert storage.glob(f"{bucket}/**/c.jsonl") == [f"{bucket}/x/deep/c.jsonl"]
    entries = [(entry.name, entry.kind, entry.size) for entry in storage.entries(f"{bucket}/x")]
    assert entries == [("a.jsonl", "file", 2), ("b.jsonl", "file", 2), ("deep", "folder", 0)]
    assert [entry.name for entry in storage.tree(f"{bucket}/")] == ["x/a.jsonl", "x/b.jsonl", "x/deep/c.jsonl", "y.csv"]
    assert storage.entry(f"{bucket}/x").kind == "folder"
    assert storage.entry(f"{bucket}/y.csv").size == 2


@pytest.mark.parametrize("url", ["sftp://user:pass@host/a", "s3://key:secret@bucket/a"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="holds a password") as caught:
        UrlStorage(url, {})
    assert "pass@" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_package_that_a_store_needs_is_named(monkeypatch):
    def without_gcsfs(*_: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.core.url_to_fs", without_gcsfs)
    with pytest.raises(MissingExtraError, match="gs:// needs one more package: Please install gcsfs"):
        UrlStorage("gs://bucket/a", {})

    def without_fsspec(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", without_fsspec)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("scale"))):
        UrlStorage("memory://a", {})


def test_options_that_do_not_fit_are_refused_without_their_values(renaming, monkeypatch):
    def failing(self, **options: object) -> None:
        raise TypeError(f"got {options}")

    monkeypatch.setattr(Renaming, "__init__", failing)
    with pytest.raises(ConfigError, match=r"the store of smb:// cannot be reached \(TypeError\)") as caught:
        UrlStorage(renaming, {"password": SECRET})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
