"""SHA-256 of files: read once, and again whenever the file may be another one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_vl_classifier.files.cache import cache_folder
from qwen_vl_classifier.files.digests import file_digest, file_digests
from tests.waiting import LIMIT

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
LONG_AGO = 1_600_000_000_123_456_789


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files that were read to compute a digest."""
    found: list[str] = []
    compute = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: found.append(file.name) or compute(file, kind))
    return found


@pytest.fixture
def later(monkeypatch) -> None:
    """Move the clock on: what has just been written counts as settled."""
    monkeypatch.setattr("qwen_vl_classifier.files.digests.time.time", lambda: 2**40)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def records() -> list[Path]:
    folder = cache_folder("digests")
    assert folder is not None
    return sorted(folder.iterdir())


@pytest.mark.usefixtures("later")
class TestReading:
    def test_a_file_is_read_once(self, file, reads):
        assert [file_digest(file) for _ in range(3)] == [DIGEST] * 3
        assert len(reads) == 1
        assert len(records()) == 1

    def test_however_it_is_called(self, file, reads, tmp_path, monkeypatch):
        (tmp_path / "link").symlink_to(file)
        (tmp_path / "folder").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        paths = [file, tmp_path / "link", tmp_path / "folder" / file.name, Path(file.name)]
        assert {file_digest(path) for path in paths} == {DIGEST}
        assert len(reads) == 1

    def test_another_process_reads_it_no_more(self, file, reads):
        code = (
            "import sys; from pathlib import Path; import qwen_vl_classifier.files.digests as digests\n"
            "digests.time.time = lambda: 2**40\nprint(digests.file_digest(Path(sys.argv[1])))"
        )
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)], cwd=root, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == DIGEST
        assert file_digest(file) == DIGEST
        assert reads == []

    @pytest.mark.parametrize("change", ["content", "time", "replaced", "time put back"])
    def test_a_changed_file_is_read_again(self, file, reads, change, tmp_path):
        file_digest(file)
        content = CONTENT
        if change == "time":
            os.utime(file, ns=(LONG_AGO, LONG_AGO))
        elif change == "replaced":  # another file, with the same size and times
            times = file.stat()
            shutil.move(file, tmp_path / "old")
            content = CONTENT[::-1]
            file.write_bytes(content)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif change == "content":
            content = CONTENT + b"x"
            file.write_bytes(content)
        else:
            times = file.stat()
            content = CONTENT[::-1]
            while True:  # a moment within one tick of the file system's clock is the subject of another test
                file.write_bytes(content)
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
                if file.stat().st_ctime_ns != times.st_ctime_ns:
                    break
        assert file_digest(file) == hashlib.sha256(content).hexdigest()
        assert len(reads) == 2

    @pytest.mark.parametrize(
        "damage",
        ["", "{", "[]", "null", "cut", "digest", "no digest", "long digest", "number", "path", "[" * 100_000, "folder"],
    )
    def test_a_record_that_cannot_be_read_is_not_believed(self, file, reads, damage):
        file_digest(file)
        (record,) = records()
        content = json.loads(record.read_text())
        changes = {
            "digest": {"sha256": "0" * 63},
            "no digest": {"sha256": None},
            "long digest": {"sha256": DIGEST + "\n"},
            "number": {"sha256": 5},
            "path": {"path": "/another/file"},
        }
        if damage == "folder":
            record.unlink()
            record.mkdir()
        elif damage == "cut":
            record.write_bytes(record.read_bytes()[:-1])
        else:
            record.write_text(json.dumps(content | changes[damage]) if damage in changes else damage)
        assert file_digest(file) == DIGEST
        assert len(reads) == 2

    def test_many_at_a_time(self, file):
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(file_digest, [file] * 40)) == {DIGEST}
        assert len(records()) == 1

    def test_records_do_not_pile_up(self, file, tmp_path, monkeypatch):
        monkeypatch.setattr("qwen_vl_classifier.files.digests._MOST_RECORDS", 20)
        for number in range(50):
            path = tmp_path / f"{number}.safetensors"
            path.write_bytes(CONTENT)
            file_digest(path)
            assert len(records()) <= 20


class TestSeveral:
    def test_digests_come_in_the_order_of_the_files(self, tmp_path):
        contents = [bytes([number]) * (40 - number) for number in range(20)]
        paths = [tmp_path / f"{number}.safetensors" for number in range(20)]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        assert file_digests(paths) == [hashlib.sha256(content).hexdigest() for content in contents]
        assert file_digests([]) == []

    def test_they_are_read_at_the_same_time(self, file, tmp_path, monkeypatch):
        other = shutil.copy(file, tmp_path / "other.safetensors")
        both = threading.Barrier(2, timeout=LIMIT)  # nobody passes it alone
        compute = hashlib.file_digest
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.setattr(hashlib, "file_digest", lambda opened, kind: both.wait() * 0 or compute(opened, kind))
        assert file_digests([file, other]) == [DIGEST] * 2

    def test_one_that_cannot_be_read_is_an_error(self, file, tmp_path):
        with pytest.raises(FileNotFoundError):
            file_digests([file, tmp_path / "missing.safetensors"])


class TestWithoutACache:
    def test_a_cache_that_cannot_be_written(self, file, reads, caches):
        caches.write_text("a file in its place")
        assert [file_digest(file) for _ in range(2)] == [DIGEST] * 2
        assert len(reads) == 2

    @pytest.mark.usefixtures("later")
    def test_a_full_disk(self, file, reads, monkeypatch):
        def full(*_args, **_options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("qwen_vl_classifier.files.digests.write_file", full)
        assert [file_digest(file) for _ in range(2)] == [DIGEST] * 2
        assert len(reads) == 2

    def test_a_folder_that_others_may_write_to(self, file):
        folder = cache_folder("digests")
        assert folder is not None
        folder.chmod(0o777)
        assert file_digest(file) == DIGEST
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("whole_seconds", [False, True])
    def test_a_file_that_has_just_changed_is_not_recorded(self, file, whole_seconds, monkeypatch):
        """Within one tick of the file system's clock it may change again and look the same."""
        moment = file.stat().st_ctime_ns / 10**9
        if whole_seconds:
            moment = int(moment)
            stat = Path.stat
            monkeypatch.setattr(
                Path,
                "stat",
                lambda path, **options: _WholeSeconds(stat(path)) if path.name == file.name else stat(path, **options),
            )
        wait = 2.0 if whole_seconds else 0.05
        for age, number in ((wait * 0.9, 0), (wait * 1.1, 1)):
            monkeypatch.setattr("qwen_vl_classifier.files.digests.time.time", lambda age=age: moment + age)
            assert file_digest(file) == DIGEST
            assert len(records()) == number

    def test_a_file_that_changes_while_it_is_read(self, file, monkeypatch):
        def read_slowly(_file, _kind):
            file.write_bytes(CONTENT * 2)
            return hashlib.sha256(CONTENT)

        monkeypatch.setattr("qwen_vl_classifier.files.digests.time.time", lambda: 2**40)
        monkeypatch.setattr(hashlib, "file_digest", read_slowly)
        assert file_digest(file) == DIGEST
        assert records() == []


class _WholeSeconds:
    """The state of a file on a file system that counts in seconds."""

    def __init__(self, status: os.stat_result) -> None:
        self._status = status

    def __getattr__(self, name: str) -> object:
        value = getattr(self._status, name)
        return value // 10**9 * 10**9 if name.endswith("time_ns") else value


class TestTheHubsCache:
    """There a weight file is a link to a blob that is named by its SHA-256."""

    def test_a_blob_is_not_read(self, file, tmp_path, reads):
        (tmp_path / "blobs").mkdir()
        shutil.copy(file, tmp_path / "blobs" / DIGEST)
        (tmp_path / "snapshots").mkdir()
        (tmp_path / "snapshots" / "model.safetensors").symlink_to(tmp_path / "blobs" / DIGEST)
        assert file_digest(tmp_path / "snapshots" / "model.safetensors") == DIGEST
        assert reads == []
        assert records() == []

    @pytest.mark.parametrize("place", ["elsewhere/" + "a" * 64, "blobs/" + "z" * 64, "blobs/model"])
    def test_other_links_are_read(self, file, place, tmp_path, reads):
        target = tmp_path / place
        target.parent.mkdir()
        shutil.copy(file, target)
        (tmp_path / "link.safetensors").symlink_to(target)
        assert file_digest(tmp_path / "link.safetensors") == DIGEST
        assert len(reads) == 1
