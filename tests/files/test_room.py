"""What cannot be saved is said before the work, and looking leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files import room
from qwen_vl_classifier.files.room import check_apart, check_room, check_writable


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("name", ["out", "a/b/out", "there", "out.with.dots", "Ausgabe für Katzen"])
def test_a_place_that_will_do_is_left_as_it_was(tmp_path, name, replaced):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / name, replaced=replaced)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "is a file, expected a folder"),
        ("file/out", "Not a directory|File exists"),
        ("file/a/out", "Not a directory"),
        ("x" * 250, "File name too long"),
        ("/proc/out", "cannot be written"),
        ("/proc/a/out", "cannot be written"),
    ],
)
@pytest.mark.parametrize("replaced", [True, False])
def test_a_place_that_will_not_do_is_named_with_the_reason(tmp_path, name, reason, replaced):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=reason) as caught:
        check_writable(tmp_path / name, replaced=replaced)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            check_writable(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_on_which_a_disk_is_mounted_is_not_replaced():
    with pytest.raises(ConfigError, match="give a folder inside it"):
        check_writable(Path("/proc"), replaced=True)


def test_folders_in_what_is_replaced_are_refused(tmp_path):
    out = tmp_path / "out"
    check_apart(out, features=tmp_path / "features", run=tmp_path / "out-run", store=None)
    for inside in (out, out / "features", tmp_path / "x" / ".." / "out" / "run"):
        with pytest.raises(ConfigError, match=r"^run=.* lies in .*give a folder outside it"):
            check_apart(out, run=inside)


def test_disks_have_room_for_all_that_goes_there(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(3 * 10**9))
    check_room([(tmp_path / "a" / "b", 2 * 10**9), (tmp_path, 10**9)], "the run")
    with pytest.raises(ConfigError, match=r"the run will take about 3.5 GB, and 3 GB are free there"):
        check_room([(tmp_path / "a", 2 * 10**9), (tmp_path / "b", 15 * 10**8)], "the run")
    monkeypatch.undo()
    assert shutil.disk_usage(tmp_path).free > 1000
    check_room([(tmp_path, 1000)], "the run")
