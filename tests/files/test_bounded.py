"""What others may have put in the place of a file is refused at once, and what a file holds is bounded."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from qwen_vl_classifier.files.bounded import MOST_DEPTH, open_regular_file, parse_json, read_file, read_json

DIGESTS = ["a1" * 20, "0f" * 32]


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(OSError, match=r".") as caught:
        action(*arguments, **options)
    assert caught.value.strerror
    return caught.value.strerror


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "folder" / "file.json"
    path.parent.mkdir()
    path.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    return path


class TestKinds:
    """Only a regular file is read."""

    def test_a_file(self, file):
        with open_regular_file(file) as opened:
            assert opened.read() == file.read_bytes()
        assert read_json(file) == {"a": [1, "ü"]}

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        assert refusal(open_regular_file, tmp_path / "pipe") == "it is a pipe, socket or device"

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
    def test_a_device_is_not_opened(self, tmp_path, device, monkeypatch):
        (tmp_path / "link").symlink_to(device)
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
        assert refusal(open_regular_file, tmp_path / "link") == "it is a pipe, socket or device"

    def test_a_file_that_becomes_a_pipe_between_the_look_and_the_opening(self, file, monkeypatch):
        look = file.stat()
        file.unlink()
        os.mkfifo(file)
        monkeypatch.setattr(Path, "stat", lambda _: look)
        assert refusal(open_regular_file, file) == "it is a pipe, socket or device"

    def test_a_socket(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket")
            assert refusal(open_regular_file, "socket") == "it is a pipe, socket or device"

    def test_a_folder_a_missing_file_and_impossible_paths(self, tmp_path):
        with pytest.raises(IsADirectoryError):
            open_regular_file(tmp_path)
        with pytest.raises(FileNotFoundError):
            open_regular_file(tmp_path / "none")
        (tmp_path / "circle").symlink_to("circle")
        refusal(open_regular_file, tmp_path / "circle")
        for path in ("a\0b", "a\ud800b"):
            assert refusal(open_regular_file, path) == "the path is not valid"


class TestSizes:
    """Nothing is read of a file that is too large."""

    def test_a_large_file(self, file):
        with file.open("wb") as hollow:
            hollow.truncate(1 << 40)
        for read in (open_regular_file, read_file, read_json):
            assert "1,099,511,627,776 bytes, expected at most 1,000" in refusal(read, file, most=1000)

    def test_the_bound_itself(self, file):
        size = file.stat().st_size
        assert read_file(file, most=size) == file.read_bytes()
        refusal(read_file, file, most=size - 1)

    @pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
    def test_a_file_of_the_kernel_that_says_it_is_empty(self):
        assert refusal(read_file, "/proc/self/status", most=10) == "it has more than 10 bytes"


class TestLinks:
    """A link may not lead out of a folder that others wrote, but into the hub's cache."""

    def test_inside(self, file):
        (file.parent / "link.json").symlink_to("file.json")
        (file.parent / "inner").mkdir()
        (file.parent / "inner" / "up.json").symlink_to("../file.json")
        for name in ("file.json", "link.json", "inner/up.json"):
            assert read_json(file.parent / name, inside=file.parent) == read_json(file)

    def test_the_folder_itself_may_be_a_link(self, file, tmp_path):
        (tmp_path / "alias").symlink_to("folder")
        assert read_json(tmp_path / "alias" / "file.json", inside=tmp_path / "alias") == read_json(file)

    @pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../folder-2/secret", "../blobs/secret"])
    def test_outside(self, file, tmp_path, target):
        for place in (tmp_path, tmp_path / "folder-2", tmp_path / "blobs"):
            place.mkdir(exist_ok=True)
            (place / "secret").write_text("{}")
        (file.parent / "link.json").symlink_to(target)
        assert refusal(read_file, file.parent / "link.json", most=10**6, inside=file.parent) == (
            "a link leads out of its folder"
        )
        assert read_file(file.parent / "link.json", most=10**6)

    @pytest.mark.parametrize("digest", DIGESTS)
    def test_blobs_of_the_hub_s_cache(self, tmp_path, digest):
        snapshot = tmp_path / "models--a--b" / "snapshots" / "c0"
        snapshot.mkdir(parents=True)
        blob = tmp_path / "models--a--b" / "blobs" / digest
        blob.parent.mkdir()
        blob.write_text("[]")
        (snapshot / "config.json").symlink_to(f"../../blobs/{digest}")
        assert read_json(snapshot / "config.json", inside=snapshot) == []


class TestJson:
    """JSON is UTF-8, and nested no deeper than anything needs."""

    @pytest.mark.parametrize("opening", ["[", '{"a":'])
    @pytest.mark.parametrize("levels", [MOST_DEPTH + 1, 900, 100_000])
    def test_depth(self, opening, levels):
        closing = {"[": "]", '{"a":': "}"}[opening]
        with pytest.raises(ValueError, match="nested more than 64 levels"):
            parse_json(opening * levels + "1" + closing * levels)

    def test_the_depth_that_is_allowed(self):
        text = "[" * MOST_DEPTH + "]" * MOST_DEPTH
        assert json.dumps(parse_json(text)) == text

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", '{"a": 1}'.encode("utf-16"), b'"\xc3"', b"1" * 5000])
    def test_malformed(self, content):
        with pytest.raises(ValueError, match=r"."):
            parse_json(content)
