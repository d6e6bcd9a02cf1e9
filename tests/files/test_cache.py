"""The user's cache folder: private, and never in the way."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from qwen_vl_classifier.files.cache import cache_folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def test_it_is_made_for_this_user_alone(caches):
    umask = os.umask(0)
    try:
        folder = cache_folder("digests")
    finally:
        os.umask(umask)
    assert folder == caches / "qwen-vl-classifier" / "digests"
    assert folder.is_dir()
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert cache_folder("digests") == folder


@pytest.mark.parametrize("given", [None, "", "relative/folder"])
def test_without_a_given_place_it_is_the_platforms(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder("digests") == tmp_path / place / "qwen-vl-classifier" / "digests"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("part", ["", "digests"])
def test_a_folder_that_others_may_write_to_is_not_used(mode, part):
    folder = cache_folder("digests")
    (folder.parent / part).chmod(mode)
    assert cache_folder("digests") is None


def test_a_folder_of_somebody_else_is_not_used(monkeypatch):
    folder = cache_folder("digests")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert cache_folder("digests") is None


def test_a_link_is_not_used(caches, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (caches / "qwen-vl-classifier").mkdir(parents=True, mode=0o700)
    (caches / "qwen-vl-classifier" / "digests").symlink_to(tmp_path / "elsewhere")
    assert cache_folder("digests") is None


def test_where_it_cannot_be_made_there_is_none(caches, monkeypatch):
    caches.write_text("a file in its place")
    assert cache_folder("digests") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no such folder")
    assert cache_folder("digests") is None
