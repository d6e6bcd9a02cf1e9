"""No picture is on both sides of a split, whatever its rows call it: what cannot be learned is not promised."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, TrainConfig, evaluate, train
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.training.finetuning.finetuning import finetune
from qwen_vl_classifier.training.overlap import row_hashes, sketch
from qwen_vl_classifier.training.splitting import groups_of, holdout
from tests import nano
from tests.tuning import FULL

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES, ROWS_EACH = 24, 5
LABELS = np.random.default_rng(1).permutation(np.arange(PICTURES) % 2)


def copied(folder: Path, path: Path, row: int) -> Path:
    return Path(shutil.copy(path, folder / f"{path.stem} copy {row}.png"))


def linked(folder: Path, path: Path, row: int) -> Path:
    link = folder / f"{path.stem} link {row}.png"
    link.hardlink_to(path) if row % 2 else link.symlink_to(path)
    return link


def saved_again(folder: Path, path: Path, row: int) -> bytes:
    kinds = [{"format": "PNG"}, {"format": "WEBP", "lossless": True}, {"format": "PNG", "compress_level": 1}]
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(buffer, **kinds[row % 3])
    return buffer.getvalue()


def opened(folder: Path, path: Path, row: int) -> Image.Image:
    return Image.open(path).copy() if row % 2 else Image.open(path)


WAYS: dict[str, Callable[[Path, Path, int], object]] = {
    "one path": lambda folder, path, row: str(path),
    "two spellings": lambda folder, path, row: f"{folder}/./{path.name}" if row % 2 else path,
    "copies": copied,
    "links": linked,
    "saved again": saved_again,
    "PIL images": opened,
    "all at once": lambda folder, path, row: [copied, linked, saved_again, opened][row % 4](folder, path, row),
}


def rows_of(folder: Path, way: str) -> list[Example]:
    """Noise with one random label each, five rows to a picture."""
    rng = np.random.default_rng(0)
    rows = []
    for number, label in enumerate(LABELS.tolist()):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(path)
        rows += [Example(WAYS[way](folder, path, row), f"text {row}", label) for row in range(ROWS_EACH)]
    return rows


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")
    return Backbone.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[Example]:
    return rows_of(tmp_path_factory.mktemp("plain"), "one path")


def trained(backbone: Backbone, rows: list[Example]):
    return train(rows, backbone=backbone, config=TrainConfig(taps="mean:2", heads="linear"), progress=False)


@pytest.fixture(scope="module")
def expected(backbone, plain, one_thread):
    """What comes of rows that all call a picture by one path."""
    return trained(backbone, plain)


@pytest.mark.parametrize(
    "way",
    [
        way if way in ("copies", "saved again", "all at once") else pytest.param(way, marks=pytest.mark.soak)
        for way in list(WAYS)[1:]
    ],
)
def test_the_estimate_is_that_of_chance_whatever_rows_call_their_picture(backbone, expected, tmp_path, way):
    found = trained(backbone, rows_of(tmp_path, way))
    for name in ("accuracy", "log_loss", "auroc"):  # rows are encoded in another order, which may change a last bit
        assert found.estimate[name] == pytest.approx(expected.estimate[name], abs=1e-4), name
    assert found.estimate["groups"] == PICTURES
    assert found.estimate["accuracy"]["mean"] < 0.65
    assert found.classifier.training["rows_sketch"] == expected.classifier.training["rows_sketch"]


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_held_out_by_picture_before_anything_is_encoded(plain, tmp_path, way):
    rows = rows_of(tmp_path, way)
    for part, expected in zip(holdout(rows, 0.2, 0), holdout(plain, 0.2, 0), strict=True):
        np.testing.assert_array_equal(part, expected)
    assert groups_of(rows).tolist() == [row // ROWS_EACH for row in range(len(rows))]


@pytest.mark.parametrize("way", ["copies", "PIL images"])
def test_training_rows_are_known_again_by_any_name(plain, tmp_path, way):
    rows = rows_of(tmp_path, way)
    assert len(set(sketch(row_hashes(plain))).intersection(row_hashes(rows))) == 64


def test_fine_tuning_holds_out_whole_pictures(backbone, plain, tmp_path, monkeypatch):
    rows = rows_of(tmp_path, "all at once")
    parts = []
    monkeypatch.setattr(
        "qwen_vl_classifier.training.finetuning.finetuning.LabelledRows",
        lambda examples, *_: parts.append(examples) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        finetune(backbone, rows, config=FULL, progress=False)
    (kept,) = parts
    numbers = {rows.index(row) // ROWS_EACH for row in kept}
    assert len(kept) == len(numbers) * ROWS_EACH


@pytest.mark.parametrize("way", ["copies", "links", "all at once"])
def test_intervals_draw_whole_pictures(backbone, plain, tmp_path, way):
    classifier = Classifier(
        backbone,
        Tap(2, "mean"),
        HeadSpec("linear", backbone.hidden_size).build(),
        HeadSpec("linear", backbone.hidden_size),
    )
    config = EvaluateConfig(checks=False, resamples=200)
    found, expected = (evaluate(classifier, rows, config=config) for rows in (rows_of(tmp_path, way), plain))
    assert found["rows"]["groups"] == PICTURES
    for name, measured in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(measured, abs=1e-5), name
    assert found["data"]["near_duplicates"] == expected["data"]["near_duplicates"]


def test_evaluation_finds_training_rows_by_any_name(backbone, plain, tmp_path):
    spec = HeadSpec("linear", backbone.hidden_size)
    classifier = Classifier(backbone, Tap(2, "mean"), spec.build(), spec)
    rows = rows_of(tmp_path, "all at once")
    found = evaluate(classifier, rows, config=EvaluateConfig(checks=False, resamples=20), training=plain)
    assert found["data"]["pictures_in_training"]["total"] == len(rows)
    assert found["data"]["exact_duplicates"]["training"]["total"] == len(rows)
