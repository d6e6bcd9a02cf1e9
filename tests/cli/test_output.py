"""What is printed may get lost; what was computed is not, and what was there is not replaced unasked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scenes.statements import write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), split="test", name="rows", seed=0, scenes=12, per_scene=2)


@pytest.fixture
def saved(tiny_classifier, tmp_path) -> Path:
    return tiny_classifier.save(tmp_path / "saved")


@pytest.fixture
def without_readers(monkeypatch) -> Iterator[None]:
    """Standard output and error are pipes that nobody reads, written line by line."""
    streams = []
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        streams.append(os.fdopen(writing, "w", buffering=1))
        monkeypatch.setattr(sys, name, streams[-1])
    yield
    for stream in streams:
        stream.close()


@pytest.mark.usefixtures("without_readers")
class TestNobodyReads:
    """`| head -3` ends the reader, not the work."""

    def test_the_report_is_written(self, saved, data, tmp_path):
        out = tmp_path / "report"
        assert main(["evaluate", str(saved), str(data), "--out", str(out), "--no-checks", "--resamples", "10"]) == 0
        assert (out / "report.html").is_file()

    def test_the_comparison_is_written(self, saved, data, tmp_path):
        out = tmp_path / "report"
        assert main(["evaluate", str(saved), str(saved), str(data), "--out", str(out), "--resamples", "10"]) == 0
        assert (out / "comparison.json").is_file()

    def test_the_classifier_is_saved(self, data, tmp_path):
        out = tmp_path / "classifier"
        assert main(["train", str(data), "--out", str(out), "--taps", "mean:-1", "--heads", "linear"]) == 0
        assert read_manifest(out).backbone["name"] == "builtin:tiny"

    def test_the_features_are_kept(self, data, tmp_path):
        assert main(["extract", str(data), "--features", str(tmp_path / "features")]) == 0
        assert len(list((tmp_path / "features").glob("*.parquet"))) == 1

    @pytest.mark.parametrize("verb", ["info", "predict", "explain"])
    def test_the_status_is_that_of_the_work(self, saved, verb):
        assert main([verb, str(saved), *([] if verb == "info" else ["-", "a text"])]) == 0
        assert main([verb, str(saved / "gone"), *([] if verb == "info" else ["-", "a text"])]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line_and_the_report_is_there(saved, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report"
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status = main(["evaluate", str(saved), str(data), "--out", str(out), "--no-checks", "--resamples", "10"])
    assert status == 2
    assert (out / "report.html").is_file()
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


def test_without_standard_output(saved, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as where it was closed before the program began
    assert main(["info", str(saved)]) == 0


@pytest.mark.parametrize(
    "command",
    [
        lambda data, out: ["train", str(data), "--out", str(out)],
        lambda data, out: ["finetune", str(data), "--out", str(out)],
        lambda data, out: ["finetune", str(data), "--out", str(out), "--resume"],
        lambda _, out: ["demo", "--out", str(out.parent)],
    ],
    ids=["train", "finetune", "finetune --resume", "demo"],
)
def test_a_classifier_is_not_overwritten_unasked(
    tiny_classifier, tmp_path, capsys, command: Callable[[Path, Path], list[str]]
):
    out = tiny_classifier.save(tmp_path / "classifier")
    before = (out / "classifier.json").read_bytes()
    assert main(command(tmp_path / "not looked at", out)) == 2  # before the data is read
    message = capsys.readouterr().err
    assert str(out) in message
    assert "--overwrite" in message
    assert (out / "classifier.json").read_bytes() == before


def test_it_is_overwritten_where_asked(saved, data):
    assert main(["train", str(data), "--out", str(saved), "--taps", "mean:2", "--heads", "linear", "--overwrite"]) == 0
    assert str(read_manifest(saved).tap) == "mean:2"
