"""Files and folders are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qwen_vl_classifier.files import whole
from qwen_vl_classifier.files.whole import (
    clear_leftovers,
    is_partial,
    new_file,
    new_folder,
    partial_name,
    recover_folder,
    write_file,
)

ROOT = Path(__file__).resolve().parents[2]

STOPS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]

WRITE = """
import sys, time
from pathlib import Path
from qwen_vl_classifier.files.whole import new_{kind}
with new_{kind}(Path(sys.argv[1])):
    print("writing", flush=True)
    time.sleep(600)
"""


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_partial(path.name)]


def refuse_to_exchange(monkeypatch: pytest.MonkeyPatch, number: int = errno.EINVAL) -> None:
    def refused(_one: Path, _other: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(whole, "exchange", refused)


class TestFiles:
    """`new_file` and `write_file`."""

    def test_bytes_and_text(self, tmp_path):
        write_file(tmp_path / "a", b"\x00\xff")
        write_file(tmp_path / "b", "größer")
        assert (tmp_path / "a").read_bytes() == b"\x00\xff"
        assert (tmp_path / "b").read_bytes() == "größer".encode()

    def test_a_file_is_there_only_when_it_is_complete(self, tmp_path):
        with new_file(tmp_path / "a") as file:
            file.write(b"new")
            assert not (tmp_path / "a").exists()
        assert content(tmp_path) == {"a": "new"}

    def test_a_library_may_write_it_by_name(self, tmp_path):
        with new_file(tmp_path / "a") as file:
            Path(file.name).write_text("by name")
        assert content(tmp_path) == {"a": "by name"}

    @pytest.mark.parametrize("stop", STOPS)
    def test_a_failure_leaves_the_old_one(self, tmp_path, stop):
        write_file(tmp_path / "a", "old")

        def write() -> None:
            with new_file(tmp_path / "a") as file:
                file.write(b"half of the ne")
                raise stop

        with pytest.raises(type(stop)):
            write()
        assert content(tmp_path) == {"a": "old"}

    def test_once_fails_where_the_name_is_taken(self, tmp_path):
        write_file(tmp_path / "a", "old")
        with pytest.raises(FileExistsError), new_file(tmp_path / "a", once=True) as file:
            file.write(b"new")
        assert content(tmp_path) == {"a": "old"}

    def test_a_writer_whose_file_was_taken_before_it_was_locked_takes_another(self, tmp_path, monkeypatch):
        taken = []

        def lock(file, _operation):
            if not taken:
                taken.append(file.name)
                Path(file.name).unlink()  # as another process would, between the two steps

        monkeypatch.setattr(whole.fcntl, "flock", lock)
        write_file(tmp_path / "a", "new")
        assert taken
        assert (tmp_path / "a").read_text() == "new"


class TestFolders:
    """`new_folder`."""

    def test_a_new_one_with_its_parents(self, tmp_path):
        with new_folder(tmp_path / "a" / "b") as partial:
            (partial / "file").write_text("new")
            assert not (tmp_path / "a" / "b").exists()
        assert content(tmp_path / "a" / "b") == {"file": "new"}
        assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]

    def test_who_may_read_the_folder_may_read_its_files(self, tmp_path):
        (tmp_path / "elsewhere").touch(mode=0o600)
        with new_folder(tmp_path / "x") as partial:
            (partial / "inner").mkdir(mode=0o700)
            (partial / "private").touch(mode=0o600)
            (partial / "inner" / "private").touch(mode=0o600)
            (partial / "link").symlink_to(tmp_path / "elsewhere")
            partial.chmod(0o750)
        assert (tmp_path / "x" / "private").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "x" / "inner" / "private").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOSYS])
    def test_an_old_one_is_replaced_with_all_that_it_holds(self, tmp_path, monkeypatch, number):
        if number:
            refuse_to_exchange(monkeypatch, number)
        for files in (["a", "b"], ["b", "c"]):
            with new_folder(tmp_path / "x") as partial:
                for name in files:
                    (partial / name).write_text(name)
        assert content(tmp_path / "x") == {"b": "b", "c": "c"}
        assert list(tmp_path.iterdir()) == [tmp_path / "x"]

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this step")
    def test_at_no_moment_is_there_nothing(self, tmp_path, monkeypatch):
        with new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("old")
        renamed = []
        monkeypatch.setattr(Path, "replace", lambda *paths: renamed.append(paths))
        monkeypatch.setattr(Path, "rename", lambda *paths: renamed.append(paths))
        with new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("new")
        assert content(tmp_path / "x") == {"file": "new"}
        assert renamed == []  # of two renames, a moment without any version would lie between

    @pytest.mark.parametrize("stop", STOPS)
    def test_a_failure_leaves_the_old_one(self, tmp_path, stop):
        with new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("old")

        def write() -> None:
            with new_folder(tmp_path / "x") as partial:
                (partial / "file").write_text("new")
                raise stop

        with pytest.raises(type(stop)):
            write()
        assert content(tmp_path / "x") == {"file": "old"}
        assert list(tmp_path.iterdir()) == [tmp_path / "x"]

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("step", [0, 1])
    def test_an_interrupt_at_either_of_two_renames_leaves_one_version(self, tmp_path, monkeypatch, when, step):
        refuse_to_exchange(monkeypatch)
        with new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("old")
        replace, steps = Path.replace, []

        def interrupted(path, target):
            steps.append(path)
            if len(steps) == step + 1 and when == "before":
                raise KeyboardInterrupt
            replace(path, target)
            if len(steps) == step + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", interrupted)
        with suppress(KeyboardInterrupt), new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("new")
        assert content(tmp_path / "x") == {"file": "new" if (when, step) == ("after", 1) else "old"}
        assert list(tmp_path.iterdir()) == [tmp_path / "x"]


class TestRecovery:
    """`recover_folder`."""

    def test_the_old_version_comes_back_after_a_kill_between_two_renames(self, tmp_path):
        old = tmp_path / f".x.{'0' * 32}.old"
        old.mkdir()
        (old / "file").write_text("old")
        (tmp_path / f".x.{'0' * 32}.partial").mkdir()
        recover_folder(tmp_path / "x")
        assert content(tmp_path / "x") == {"file": "old"}

    @pytest.mark.parametrize("name", [".xy.{}.old", ".x.{}.partial", "x.{}.old"])
    def test_what_belongs_to_others_does_not(self, tmp_path, name):
        (tmp_path / name.format("0" * 32)).mkdir()
        recover_folder(tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_what_is_there_stays(self, tmp_path):
        with new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("new")
        (tmp_path / f".x.{'0' * 32}.old").mkdir()
        recover_folder(tmp_path / "x")
        assert content(tmp_path / "x") == {"file": "new"}


class TestLeftovers:
    """What a dead writer left goes; what a living one is at work on stays."""

    def test_of_the_dead(self, tmp_path):
        for name in ("a.txt", "b"):
            (tmp_path / partial_name(name)).write_bytes(b"half")
        folder = tmp_path / partial_name("c")
        folder.mkdir()
        (folder / "file").write_text("half")
        clear_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_of_one_name(self, tmp_path):
        for name in ("a", "b", "a.b"):
            (tmp_path / partial_name(name)).write_bytes(b"half")
        clear_leftovers(tmp_path, "b")
        assert sorted(path.name.split(".")[1] for path in leftovers(tmp_path)) == ["a", "a"]

    def test_the_next_write_clears(self, tmp_path):
        (tmp_path / partial_name("a")).write_bytes(b"half")
        (tmp_path / partial_name("b")).mkdir()
        write_file(tmp_path / "a", "whole")
        with new_folder(tmp_path / "b"):
            pass
        assert sorted(tmp_path.iterdir()) == [tmp_path / "a", tmp_path / "b"]

    @pytest.mark.parametrize("name", ["download.partial", ".x.partial", "0.partial", f".x.{'0' * 32}.old"])
    def test_of_others(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"")
        clear_leftovers(tmp_path)
        assert (tmp_path / name).exists()

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_of_the_living_until_they_die(self, tmp_path, kind):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE.format(kind=kind), str(tmp_path / "a")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            clear_leftovers(tmp_path)
            assert len(leftovers(tmp_path)) == 1
            process.kill()
        clear_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_link_in_their_place_is_not_followed(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").write_text("mine")
        (tmp_path / partial_name("a")).symlink_to(tmp_path / "mine")
        clear_leftovers(tmp_path)
        assert content(tmp_path / "mine") == {"file": "mine"}


def test_partial_names_are_told_from_others():
    assert is_partial("shards/" + partial_name("000000.parquet"))
    assert not is_partial("shards/a.partial")
    assert not is_partial(".hidden")
