"""`label` as a process of its own: real HTTP on a port that the system chose, killed, gone on with and ended."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data.loading import load_examples
from tests.fresh import FreshProcesses
from tests.waiting import LIMIT, until

PROGRAM = """
import os, sys
from qwen_vl_classifier.cli.main import main
sys.stdout = open(sys.argv[1], "w")
print(os.getpid(), flush=True)
sys.exit(main(sys.argv[2:]))
"""


class Page:
    """What the page does, without a browser.

    Args:
        out: What the command has printed.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.pid = int(out.read_text().split()[0])
        found = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=\S+", out.read_text())
        assert found is not None
        self.http = httpx.Client(base_url=found[1], timeout=LIMIT, trust_env=False)
        assert self.http.get(found[0]).status_code == 200

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.http.post(f"/api/{path}", json=body)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def answer(self, number: int, answer_to: Callable[[str], str]) -> list[str]:
        """Answer the next questions by their names; return these."""
        names = []
        found = self.post("questions", browser="tests")
        while found["questions"] and len(names) < number:
            question = found["questions"][0]
            assert self.http.get(question["images"][0]).headers["content-type"] == "image/jpeg"
            names.append(question["name"])
            given = {"key": question["key"], "label": question["label"], "answer": answer_to(names[-1])}
            found = self.post("answers", browser="tests", seconds=1.0, **given)
        return names


@contextmanager
def labelling(fresh: FreshProcesses, out: Path, *arguments: object) -> Iterator[Page]:
    """Run `label`; what it has printed is in `out`, and it has ended afterwards."""
    fresh.start(PROGRAM, out, "label", *arguments)
    try:
        until(lambda: out.exists() and "token=" in out.read_text() and out.read_text().endswith("\n"), "an address")
        page = Page(out)
        with closing(page.http):
            yield page
    finally:
        pid = int(out.read_text().split()[0])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        ended = fresh.wait()
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr


def colour(name: str) -> str:
    return "yes" if name.startswith("red") else "no"


def photos(folder: Path, count: int) -> Path:
    """Make pictures, red and blue in turn."""
    folder.mkdir()
    for number in range(count):
        name = ("red", "blue")[number % 2]
        shade = {"red": (200 + number % 50, number, 30), "blue": (30, number, 200 + number % 50)}[name]
        Image.new("RGB", (40, 40), shade).save(folder / f"{name}-{number}.png")
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_session_goes_on_and_ends_with_a_data_set(tmp_path, fresh):
    words = (photos(tmp_path / "photos", 8), "--text", "Is it red?", "--out", tmp_path / "red.jsonl", "--quiet")
    with labelling(fresh, tmp_path / "first", *words) as page:
        first = page.answer(3, colour)
        os.kill(page.pid, signal.SIGKILL)
    with labelling(fresh, tmp_path / "second", *words) as page:
        assert page.http.get("/api/progress").json()["answered"] == 3
        assert page.http.get("/api/setup").json()["title"] == "Is it red?"
        second = page.answer(3, colour)
        page.post("undo", browser="tests")
    assert len({*first, *second}) == 6
    labelled = rows(tmp_path / "red.jsonl")
    assert {Path(row["image"]).name: row["label"] for row in labelled} == {
        name: int(colour(name) == "yes") for name in (*first, *second[:2])
    }
    assert {row["sampled"] for row in labelled} >= {"random"}
    printed = (tmp_path / "second").read_text()
    assert "Labelled: 5 rows; 0 skipped, 0 unsure, 3 left" in printed
    assert f"train {tmp_path / 'red.jsonl'} --sampled-column sampled" in printed
    assert "Go on labelling\n  qwen-vl-classifier label " in printed
    assert len(load_examples(tmp_path / "red.jsonl")) == 5


@pytest.mark.soak
def test_from_photos_to_a_classifier_that_predicts(tmp_path, fresh, capsys):
    folder = photos(tmp_path / "photos", 60)
    words = (folder, "--text", "Is it red?", "--out", tmp_path / "red.jsonl", "--class-names", "blue,red", "--quiet")
    with labelling(fresh, tmp_path / "said", *words) as page:
        page.answer(60, lambda name: {"yes": "no", "no": "yes"}[colour(name)] if name == "red-0.png" else colour(name))
        page.post("finish")

        def finish() -> dict[str, Any]:
            found: dict[str, Any] = page.http.get("/api/progress").json()["finish"]
            return found

        until(lambda: finish()["state"] != "running", "the end of training")
        assert finish()["state"] == "done", finish()["message"]
        assert finish()["command"] == f"qwen-vl-classifier serve {tmp_path / 'red-classifier'}"
        assert "trained in the same way without these rows" in page.http.get("/report/").text
        # The same page goes on, and a second training replaces the first.
        page.post("finish")
        until(lambda: finish()["state"] != "running", "the end of training")
        assert finish()["state"] == "done", finish()["message"]
    saved = Classifier.load(tmp_path / "red-classifier", device="cpu")
    assert saved.label_names == ("blue", "red")
    assert saved.training["estimate"]["at_random"]
    assert "Report: " in (tmp_path / "said").read_text()
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "red-classifier"), str(folder / "red-2.png")]) == 0
    assert "red" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port 70000: give 0 to 65535"),
        (["--rows", "a.jsonl", "--scores", "scores"], "both say what to ask"),
        (["--one-of"], "--one-of without classes; name them, such as --labels cat,dog,bird"),
        (["--labels", "a,b", "--classifier", "saved"], "which has labels of its own"),
        (["--random-share", "0"], "--random-share 0"),
        ([], "is a folder of pictures, which has no texts"),
    ],
)
def test_what_cannot_be_labelled_is_one_line(tmp_path, capsys, words, message):
    assert main(["label", str(photos(tmp_path / "photos", 2)), "--out", str(tmp_path / "a.jsonl"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "a.jsonl").exists()


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    def missing(module: str, *, extra: str) -> None:
        from qwen_vl_classifier.errors import MissingExtraError

        raise MissingExtraError(f"{module} is missing; install the extra {extra}")

    monkeypatch.setattr("qwen_vl_classifier.cli.label.require", missing)
    assert main(["label", str(tmp_path), "--text", "a", "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "the extra serve" in capsys.readouterr().err
