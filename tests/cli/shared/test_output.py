"""What is printed may get lost; what was computed is not, and what was there is not replaced unasked."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.cli.shared.output import lasting_output
from qwen_vl_classifier.errors import printable
from qwen_vl_classifier.scenes.statements import write_dataset
from qwen_vl_classifier.serving.observability.logs import logging_to_stderr

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


@pytest.mark.usefixtures("without_readers", "blank_plots")
class TestNobodyReads:
    """`| head -3` ends the reader, not the work."""

    def test_the_report_is_written(self, saved, data, tmp_path):
        out = tmp_path / "report"
        assert main(["evaluate", str(saved), str(data), "--out", str(out), "--no-checks", "--resamples", "10"]) == 0
        assert (out / "report.html").is_file()

    def test_the_comparison_is_written(self, saved, tiny_classifier, data, tmp_path):
        out, other = tmp_path / "report", tiny_classifier.save(tmp_path / "other")
        assert main(["evaluate", str(saved), str(other), str(data), "--out", str(out), "--resamples", "10"]) == 0
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
def test_a_full_disk_is_one_line_and_the_report_is_there(saved, data, tmp_path, blank_plots, monkeypatch, capsys):
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


HOSTILE = "cat\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj\u2066\u2028\u200b\x7f\r\b\U000e0041"
OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def obeyed(text: str) -> set[str]:
    """Return the characters of an output that a terminal would obey or hide; line breaks are layout."""
    return {character for character in text if unicodedata.category(character) in OBEYED} - {"\n"}


@pytest.fixture
def hostile(saved) -> Path:
    """A saved classifier whose names, record and backbone hold sequences for terminals."""
    path = saved / "classifier.json"
    content = json.loads(path.read_text())
    content |= {
        "label_names": [HOSTILE, f"dog\nqwen-vl-classifier: all is well {HOSTILE}"],
        "training": {"method": HOSTILE, f"key {HOSTILE}": f"a\nb{HOSTILE}", "long": "x" * 10**6},
        "versions": {f"torch{HOSTILE}": HOSTILE},
    }
    content["backbone"]["revision"] = HOSTILE
    path.write_text(json.dumps(content))
    return saved


class TestQuoting:
    """What others wrote reaches the terminal in quotes, whatever prints it."""

    def run(self, capsys, *arguments: object) -> tuple[str, str]:
        with contextlib.suppress(SystemExit):
            main([str(argument) for argument in arguments])
        return capsys.readouterr()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["info"],
            ["predict", "-", "text"],
            ["predict", "-", "text", "--json"],
            ["explain", "-", "two words"],
            ["explain", "-", "two words", "--json"],
        ],
    )
    def test_names_of_a_saved_classifier(self, capsys, hostile, arguments):
        verb, *rest = arguments
        out, errors = self.run(capsys, verb, hostile, *rest)
        assert out
        assert not obeyed(out + errors)
        assert "qwen-vl-classifier: all is well" not in out.splitlines()
        assert max(map(len, out.splitlines())) < 10**4
        if "--json" in rest:
            json.loads(out)

    def test_json_holds_the_name_as_it_is(self, capsys, hostile):
        out, _ = self.run(capsys, "predict", hostile, "-", "text", "--json")
        assert json.loads(out)["label_name"] in json.loads((hostile / "classifier.json").read_text())["label_names"]

    def test_an_evaluation(self, capsys, hostile, data):
        out, errors = self.run(capsys, "evaluate", hostile, data, "--no-checks", "--resamples", "10")
        assert "accuracy" in out
        assert not obeyed(out + errors)

    @pytest.mark.parametrize(
        "change", [{"format_version": HOSTILE}, {HOSTILE: 1}, {"tap": HOSTILE}, {"threshold": f"a\nb{HOSTILE}"}]
    )
    def test_errors_are_one_line(self, capsys, hostile, change):
        path = hostile / "classifier.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        out, errors = self.run(capsys, "info", hostile)
        assert errors.count("\n") == 1
        assert not out
        assert not obeyed(errors)

    @pytest.mark.parametrize("key", ["name", "folder", "fingerprint"])
    def test_a_backbone_that_is_not_there(self, capsys, hostile, key):
        path = hostile / "classifier.json"
        content = json.loads(path.read_text())
        content["backbone"][key] = f"a\nb{HOSTILE}\ud800"
        path.write_text(json.dumps(content))
        _, errors = self.run(capsys, "predict", hostile, "-", "text")
        assert errors.count("\n") == 1
        assert not obeyed(errors)

    def test_columns_and_file_names(self, capsys, saved, tmp_path):
        rows = tmp_path / f"rows{HOSTILE}.jsonl"
        rows.write_text(json.dumps({f"column{HOSTILE}": HOSTILE}) + "\n")
        _, errors = self.run(capsys, "evaluate", saved, rows)
        assert errors
        assert not obeyed(errors)

    def test_warnings_progress_logs_and_tracebacks(self, capsys):
        with lasting_output():
            print(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "file", 1), file=sys.stderr)
            for _ in tqdm([1], desc=f"work {HOSTILE}"):
                pass
            with logging_to_stderr("text"):
                logging.getLogger("qwen_vl_classifier").warning(HOSTILE)
            with logging_to_stderr("json"):
                logging.getLogger("qwen_vl_classifier").warning(HOSTILE)
            print(HOSTILE, end="")
        try:
            raise ValueError(HOSTILE)
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)
        out, errors = capsys.readouterr()
        assert errors.count("cat") >= 5  # a bar may be drawn more than once
        assert obeyed(out + errors) == {"\r"}  # of the bar, which begins its line again
        assert "cat\r" not in errors

    def test_a_terminal_without_unicode(self, monkeypatch):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output() as failures:
            print("Größe 是 \ud800")
        stream.flush()
        assert stream.buffer.getvalue() == b"Gr\\xf6\\xdfe \\u662f \\ud800\n"
        assert failures == []


@pytest.mark.parametrize("text", ["", "a b\n\tc", "Größe, 是, עברית", "👨\u200d👩\u200d👧 می\u200cخواهم \u00a0\u3000"])
def test_what_people_write_stays(text):
    assert printable(text) == text
