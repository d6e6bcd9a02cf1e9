"""Scoring in this process: exact values, rows that fail alone, and runs that go on where they were killed."""

import copy
import dataclasses
import json
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import ArtifactError, ConfigError, DataError
from qwen_vl_classifier.scoring.reading import ShardReader
from qwen_vl_classifier.scoring.run import score
from tests.waiting import LIMIT

ROWS = 7
BY_TWO = ScoreConfig(shard_size=2)
DONE = {"rows": ROWS, "errors": 0, "shards_written": 4, "shards_there": 0}


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows about pictures of three sizes; the second picture has two rows and the last row has none."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        pixels = rng.integers(0, 255, (40 + 30 * (number % 3), 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    images = ["0.png", "1.png", "1.png", "2.png", "3.png", "4.png", None]
    return write(folder, *({"image": image, "text": f"Text {row}."} for row, image in enumerate(images)))


@pytest.fixture(scope="module")
def other_classifier(tiny_backbone) -> Classifier:
    """A classifier at another tap, which sometimes abstains."""
    spec = HeadSpec("linear", tiny_backbone.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Classifier(
            tiny_backbone, Tap(2, "last"), spec.build(), spec, temperature=2.0, threshold=0.6, abstention=(0.4, 0.6)
        )


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of examples in each call of the backbone."""
    counts = []
    encode = Backbone.encode_prepared

    def counting(self, prepared, taps, **options):
        counts.append(len(prepared))
        return encode(self, prepared, taps, **options)

    monkeypatch.setattr(Backbone, "encode_prepared", counting)
    return counts


def write(folder: Path, *rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def scores(out: Path) -> dict[str, list]:
    return pq.read_table(out / "shards").to_pydict()


def content(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_values_are_exactly_those_of_the_classifier(tmp_path, data, other_classifier):
    summary = score(other_classifier, data, tmp_path / "out", progress=False)
    examples = load_examples(data)
    found = scores(tmp_path / "out")
    assert summary == {"rows": ROWS, "errors": 0, "shards_written": 1, "shards_there": 0}
    assert found["probability"] == other_classifier.predict_proba(examples)[:, 1].tolist()
    assert found["label"] == other_classifier.predict(examples).tolist()
    assert found["decision"] == [prediction.decision for prediction in other_classifier.decide(examples)]
    assert found["error"] == [None] * ROWS
    assert len(set(found["probability"])) == ROWS


def test_shards_hold_the_rows_in_order(tmp_path, data, tiny_classifier):
    assert score(tiny_classifier, data, tmp_path / "out", config=BY_TWO, progress=False) == DONE
    found = scores(tmp_path / "out")
    examples = load_examples(data)
    by_two = [tiny_classifier.predict_proba(examples[start : start + 2])[:, 1] for start in range(0, ROWS, 2)]
    assert found["probability"] == np.concatenate(by_two).tolist()
    assert found["row"] == list(range(ROWS))
    assert found["id"] == [str(row) for row in range(ROWS)]
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [2, 2, 2, 1]


def test_two_classifiers_share_one_pass(tmp_path, data, tiny_classifier, other_classifier, encoded):
    score([tiny_classifier, other_classifier], data, tmp_path / "out", progress=False)
    assert encoded == [ROWS]
    found = scores(tmp_path / "out")
    expected = Panel([tiny_classifier, other_classifier]).predict_proba(load_examples(data))
    assert found["probability_classifier1"] == expected[:, 0].tolist()
    assert found["probability_classifier2"] == expected[:, 1].tolist()
    decisions = [other_classifier.decision_of(probability).decision for probability in expected[:, 1].tolist()]
    assert found["decision_classifier2"] == decisions


def test_columns_are_named_by_folder_and_never_twice(tmp_path, data, tiny_classifier, other_classifier):
    folders = [
        tiny_classifier.save(tmp_path / "a" / "m"),
        other_classifier.save(tmp_path / "b" / "m"),
        tiny_classifier.save(tmp_path / "c" / "m_2"),
    ]
    score([*folders, other_classifier], data, tmp_path / "out", device="cpu", progress=False)
    found = scores(tmp_path / "out")
    assert [name for name in found if name.startswith("probability")] == [
        "probability_m",
        "probability_m_3",
        "probability_m_2",
        "probability_classifier4",
    ]
    assert found["probability_m"] == found["probability_m_2"] != found["probability_m_3"]
    assert found["probability_m_3"] == found["probability_classifier4"]


def test_a_missing_shard_alone_is_made_again_byte_for_byte(tmp_path, data, tiny_classifier, encoded):
    out = tmp_path / "out"
    score(tiny_classifier, data, out, config=BY_TWO, progress=False)
    before = content(out)
    (out / "shards" / "000001.parquet").unlink()
    (out / "shards" / ".000001.parquet.0.partial").write_bytes(b"half")
    encoded.clear()
    summary = score(tiny_classifier, data, out, config=BY_TWO, progress=False)
    assert summary == {"rows": ROWS, "errors": 0, "shards_written": 1, "shards_there": 3}
    assert encoded == [2]
    assert content(out) == before


def test_complete_scores_load_no_backbone(tmp_path, data, tiny_classifier, monkeypatch):
    out = tmp_path / "out"
    folder = tiny_classifier.save(tmp_path / "classifier")
    score(tiny_classifier, data, out, config=BY_TWO, progress=False)  # a classifier and its folder are the same
    monkeypatch.setattr(Backbone, "load", lambda *arguments, **options: pytest.fail("a backbone was loaded"))
    summary = score(folder, data, out, config=BY_TWO, progress=False)
    assert summary == {"rows": ROWS, "errors": 0, "shards_written": 0, "shards_there": 4}


@pytest.mark.soak  # `test_kills.py` kills a driver in every run
def test_a_killed_run_goes_on_and_ends_as_if_never_killed(tmp_path, data, tiny_classifier, encoded):
    folder = tiny_classifier.save(tmp_path / "classifier")
    loaded = Classifier.load(folder, device="cpu")
    score(loaded, data, tmp_path / "whole", config=BY_TWO, progress=False)
    script = """
import os, pathlib, signal, sys
from qwen_vl_classifier import Classifier, ScoreConfig, score

replace = pathlib.Path.replace

def killed_at_the_third(self, target):
    if target.name.startswith("000002"):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

pathlib.Path.replace = killed_at_the_third
classifier = Classifier.load(sys.argv[1], device="cpu")
score(classifier, *sys.argv[2:], config=ScoreConfig(shard_size=2), progress=False)
"""
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", script, folder, data, out], capture_output=True, timeout=LIMIT)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    left = sorted(path.name for path in (out / "shards").iterdir())
    assert left[0].startswith(".000002.parquet.")
    assert left[1:] == ["000000.parquet", "000001.parquet"]
    encoded.clear()
    summary = score(loaded, data, out, config=BY_TWO, progress=False)
    assert summary == {"rows": ROWS, "errors": 0, "shards_written": 2, "shards_there": 2}
    assert encoded == [2, 1]
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("change", ["weights", "tap", "temperature", "isotonic", "threshold", "abstention"])
def test_another_classifier_is_refused(tmp_path, data, tiny_classifier, change):
    score(tiny_classifier, data, tmp_path / "out", progress=False)
    spec, head, tap = tiny_classifier.spec, tiny_classifier.head, tiny_classifier.tap
    settings = {}
    if change == "weights":
        head = copy.deepcopy(head)
        torch.nn.init.zeros_(head[-1].bias)
    elif change == "tap":
        tap = Tap(-1, "last")
    else:
        settings = {change: {"abstention": (0.5, 0.6), "isotonic": ((0.5,), (0.6,))}.get(change, 0.75)}
    other = Classifier(tiny_classifier.backbone, tap, head, spec, **settings)
    with pytest.raises(ConfigError, match=r"classifiers was probability by \w{12}, is now probability by \w{12};"):
        score(other, data, tmp_path / "out", progress=False)


def test_other_data_and_options_are_refused(tmp_path, data, tiny_classifier):
    out = tmp_path / "out"
    score(tiny_classifier, data, out, progress=False)
    changed = ScoreConfig(shard_size=2, token_budget=512, group_by_image=True)
    with pytest.raises(
        ConfigError,
        match="shard_size was 1000, is now 2; group_by_image was False, is now True; token_budget was 0, is "
        "now 512; allow_outside was False, is now True; give",
    ):
        score(tiny_classifier, data, out, config=changed, allow_outside=True, progress=False)
    with pytest.raises(ConfigError, match=r"; limit was None, is now 3; give"):
        score(tiny_classifier, data, out, limit=3, progress=False)
    with pytest.raises(ConfigError, match=r"another run: format was parquet, is now csv; give"):
        score(tiny_classifier, data, out, config=ScoreConfig(format="csv"), progress=False)
    data.write_text(data.read_text().replace("Text 3.", "Text three."))
    with pytest.raises(ConfigError, match=r"another run: data was \w{12}, is now \w{12}; give"):
        score(tiny_classifier, data, out, progress=False)


def test_labels_are_not_looked_at(tmp_path, data, tiny_classifier):
    rows = [json.loads(line) | {"label": "cat"} for line in data.read_text().splitlines()]
    summary = score(tiny_classifier, write(data.parent, *rows), tmp_path / "out", positive="dog", progress=False)
    assert summary["errors"] == 0


def test_bad_rows_become_errors_and_their_neighbours_do_not_notice(tmp_path, data, tiny_classifier, encoded):
    folder = data.parent
    good = [json.loads(line) | {"id": f"good {row}"} for row, line in enumerate(data.read_text().splitlines())]
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "notes.png").write_text("no picture")
    (folder / "bomb.png").write_bytes(_header_of_png(20_000, 20_000))
    shutil.copy(folder / "0.png", tmp_path / "outside.png")

    def bad(image, **values):
        return {"image": image, "text": "A claim.", "id": f"bad {image}", **values}

    rows = [
        bad("gone.png"),
        good[0],
        bad("broken.png"),
        good[1],
        good[2],
        bad("notes.png"),
        bad("../outside.png"),
        bad("https://example.com/a.png"),
        good[3],
        bad("0.png", text=" "),
        bad("bomb.png"),
        '{"image": ',
        bad(["1.png", "gone.png"]),
        bad(7),
        *good[4:],
    ]
    errors = [
        "line 1: image 'gone.png' does not exist",
        "broken.png': ",
        "notes.png': ",
        "line 7: image '../outside.png' is outside",
        "line 8: image 'https://example.com/a.png' is a URL",
        "line 10: text is blank",
        "bomb.png' is 20000x20000",
        "line 12: not JSON",
        "line 13: image 'gone.png' does not exist",
        "line 14: image is of type int",
    ]
    out = tmp_path / "out"
    summary = score(tiny_classifier, write(folder, *rows), out, progress=False)
    assert encoded == [ROWS]  # nothing was encoded in vain
    assert summary == {"rows": len(rows), "errors": len(errors), "shards_written": 1, "shards_there": 0}

    found = pq.read_table(out / "shards").to_pylist()
    assert [row["row"] for row in found] == list(range(len(rows)))
    assert [row["id"] for row in found if row["error"] is None] == [row["id"] for row in good]
    probabilities = tiny_classifier.predict_proba(load_examples(write(folder, *good)))[:, 1].tolist()
    assert [row["probability"] for row in found if row["error"] is None] == probabilities

    failed = [row for row in found if row["error"] is not None]
    codes = ["image_missing", "image_damaged", "image_format", "image_refused", "image_refused", "invalid_row"]
    codes += ["image_too_large", "invalid_row", "image_missing", "invalid_row"]
    assert [row["error_code"] for row in failed] == codes
    for row, error in zip(failed, errors, strict=True):
        assert error in row["error"]
        assert "\n" not in row["error"]
        assert (row["probability"], row["label"], row["decision"]) == (None, None, None)
    assert [row["id"] for row in failed[:2]] == ["bad gone.png", "bad broken.png"]
    assert failed[errors.index("line 12: not JSON")]["id"] == "11"


def test_a_shard_of_bad_rows_only_is_a_shard(tmp_path, tiny_classifier):
    (tmp_path / "notes.png").write_text("no picture")
    data = write(tmp_path, *({"image": image, "text": "x"} for image in ("gone.png", "notes.png", "notes.png")))
    summary = score(tiny_classifier, data, tmp_path / "out", config=BY_TWO, progress=False)
    assert summary == {"rows": 3, "errors": 3, "shards_written": 2, "shards_there": 0}
    again = score(tiny_classifier, data, tmp_path / "out", config=BY_TWO, progress=False)
    assert again == {"rows": 3, "errors": 3, "shards_written": 0, "shards_there": 2}


def test_a_picture_that_goes_bad_meanwhile_is_an_error_too(tmp_path, data, tiny_classifier, monkeypatch):
    folder = data.parent
    parts = ShardReader.parts

    def spoiling(self, shard):
        for rows in parts(self, shard):
            (folder / "4.png").unlink()  # after it was seen to be there
            yield rows

    monkeypatch.setattr(ShardReader, "parts", spoiling)
    summary = score(tiny_classifier, data, tmp_path / "out", progress=False)
    assert (summary["rows"], summary["errors"]) == (ROWS, 1)
    found = scores(tmp_path / "out")
    assert [(row, code) for row, code in enumerate(found["error_code"]) if code] == [(5, "image_missing")]
    assert "cannot be opened (No such file or directory)" in found["error"][5]


def test_ids_need_not_be_unique_or_writable(tmp_path, tiny_classifier):
    ids = ["same", "same", "\ud800", 7, None]
    data = write(tmp_path, *({"image": None, "text": "x", "id": name} for name in ids))
    assert score(tiny_classifier, data, tmp_path / "out", progress=False)["errors"] == 0
    assert scores(tmp_path / "out")["id"] == ["same", "same", "?", "7", "4"]


def test_rows_given_in_python_are_told_apart_by_content(tmp_path, tiny_classifier):
    out = tmp_path / "out"

    def rows(shade: int, text: str = "x") -> Iterator[Example]:
        yield Example(Image.new("RGB", (60, 40), (shade, 0, 0)), text, id="one")
        yield Example(None, "A claim.")

    summary = score(tiny_classifier, rows(9), out, progress=False)
    assert summary == {"rows": 2, "errors": 0, "shards_written": 1, "shards_there": 0}
    assert scores(out)["probability"] == tiny_classifier.predict_proba(list(rows(9)))[:, 1].tolist()
    assert score(tiny_classifier, list(rows(9)), out, progress=False)["shards_there"] == 1
    for other in (rows(8), rows(9, text="y")):
        with pytest.raises(ConfigError, match="data was"):
            score(tiny_classifier, other, out, progress=False)


def test_a_labelled_folder_is_scored_with_one_text(tmp_path, tiny_classifier):
    folder = tmp_path / "pictures"
    for label in ("0", "1"):
        (folder / label).mkdir(parents=True)
        Image.new("RGB", (60, 40), (0, 0, 200 * int(label))).save(folder / label / "a.png")
    score(tiny_classifier, folder, tmp_path / "out", text="It is blue.", progress=False)
    expected = tiny_classifier.predict_proba(load_examples(folder, text="It is blue."))[:, 1]
    assert scores(tmp_path / "out")["probability"] == expected.tolist()


def test_limit_takes_the_first_rows(tmp_path, data, tiny_classifier):
    assert score(tiny_classifier, data, tmp_path / "out", limit=3, progress=False)["rows"] == 3


def test_pictures_outside_are_scored_where_that_is_allowed(tmp_path, data, tiny_classifier):
    data = write(data.parent, {"image": "../a.png", "text": "x"})
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    assert score(tiny_classifier, data, tmp_path / "out", allow_outside=True, progress=False)["errors"] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text_column": "claim"}, DataError, "has no column 'claim'"),
        ({"limit": 0}, ConfigError, "limit=0"),
        ({"text": " "}, ConfigError, "text=' ', which is blank"),
        ({"examples": "gone.jsonl"}, DataError, r"'gone\.jsonl' cannot be opened"),
        ({"examples": []}, DataError, "holds no rows"),
        ({"classifiers": []}, ConfigError, "no classifiers"),
        ({"classifiers": "gone"}, ArtifactError, "gone: no classifier"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tmp_path, data, tiny_classifier, arguments, error, message):
    arguments = {"classifiers": tiny_classifier, "examples": data, "progress": False, **arguments}
    with pytest.raises(error, match=message):
        score(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_different_backbones_are_refused(tmp_path, data, tiny_classifier):
    other = Backbone.load("builtin:tiny", device="cpu", dtype="float32", max_pixels=50_000)
    second = Classifier(other, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec)
    with pytest.raises(ConfigError, match="make one panel for each backbone"):
        score([tiny_classifier, second], data, tmp_path / "out", progress=False)


def test_a_shard_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="shard_size 0"):
        dataclasses.replace(BY_TWO, shard_size=0)


def _header_of_png(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
