"""Panels of labels: columns of each label or of the class, one pass, and runs that go on only with the same panel."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Panel, ScoreConfig, load_examples, score
from qwen_vl_classifier.errors import ConfigError, StoppedError
from qwen_vl_classifier.scoring.counting import decision_counts
from qwen_vl_classifier.scoring.scorers.scorer_list import ScorerList
from tests.panels import CLASSES, LABELS, make_panel

ROWS = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows about two pictures, one of which is damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "0.png")
    (folder / "1.png").write_text("no picture")
    images = ["0.png", "0.png", "1.png", None, None, None]
    rows = [{"image": image, "text": f"Text {number}.", "shop": "a"} for number, image in enumerate(images)]
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def labels(tiny_backbone: Backbone) -> Panel:
    return make_panel(tiny_backbone)


@pytest.fixture(scope="module")
def classes(tiny_backbone: Backbone) -> Panel:
    return make_panel(tiny_backbone, CLASSES, one_of=True, temperature=1.7, seed=1)


def expected(data: Path, panel: Panel) -> np.ndarray:
    lines = data.read_text().splitlines()
    good = data.with_name("good.jsonl")
    good.write_text("".join(f"{line}\n" for number, line in enumerate(lines) if number != 2))
    return panel.predict_proba(load_examples(good))


def read(out: Path) -> list[dict]:
    return pq.read_table(out / "shards").to_pylist()


def told(row: dict, names: tuple[str, ...]) -> list[float]:
    return [row[f"probability_{name}"] for name in names]


@pytest.mark.usefixtures("scores_here")
def test_each_label_has_the_columns_of_a_classifier(tmp_path: Path, data: Path, labels: Panel) -> None:
    folder = labels.save(tmp_path / "parts")
    config = ScoreConfig(columns="shop")
    assert score(folder, data, tmp_path / "out", config=config, device="cpu", progress=False)["errors"] == 1
    score(labels, data, tmp_path / "memory", config=config, progress=False)
    rows = read(tmp_path / "out")
    kinds = [f"{kind}_{name}" for kind in ("probability", "label", "decision") for name in LABELS]
    assert list(rows[0]) == ["id", "row", "shop", *kinds, "label_name_dirty", "error_code", "error"]
    assert read(tmp_path / "memory") == rows
    good = [row for row in rows if row["error"] is None]
    np.testing.assert_allclose([told(row, LABELS) for row in good], expected(data, labels), rtol=0, atol=1e-6)
    for row, answer in zip(good, labels.decisions_of(expected(data, labels)), strict=True):
        assert [row[f"decision_{name}"] for name in LABELS] == [one.decision for one in answer.labels.values()]
        assert row["label_name_dirty"] == answer.labels["dirty"].label_name
    assert (rows[2]["error_code"], told(rows[2], LABELS)) == ("image_format", [None] * 3)
    lines = decision_counts(tmp_path / "out")
    assert [line.partition(":")[0] for line in lines] == list(LABELS)
    assert sum(row["decision_scratch"] == "yes" for row in good) == int(lines[1].split()[1])


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_exclusive_classes_have_probabilities_that_sum_to_one_and_a_class(
    tmp_path: Path, data: Path, classes: Panel, form: str
) -> None:
    out = tmp_path / "out"
    score(classes, data, out, config=ScoreConfig(format=form, shard_size=4), progress=False)
    (first, _) = sorted((out / "shards").iterdir())
    if form == "parquet":
        rows = pq.read_table(first).to_pylist()
    elif form == "jsonl":
        rows = list(map(json.loads, first.read_text().splitlines()))
    else:
        rows = list(csv.DictReader(io.StringIO(first.read_text())))
    names = [f"probability_{name}" for name in CLASSES]
    assert list(rows[0]) == ["id", "row", *names, "class", "class_probability", "error_code", "error"]
    assert rows[2]["class"] in (None, "")
    found = expected(data, classes)
    for row, line in zip([rows[0], rows[1], rows[3]], found, strict=False):
        np.testing.assert_allclose([float(row[name]) for name in names], line, rtol=0, atol=1e-6)
        assert row["class"] == CLASSES[line.argmax()]
        assert float(row["class_probability"]) == max(float(row[name]) for name in names)
    counts = [int((found.argmax(axis=1) == number).sum()) for number in range(3)]
    assert decision_counts(out) == [", ".join(f"{count} {name}" for count, name in zip(counts, CLASSES, strict=True))]


def test_panels_and_classifiers_share_one_pass(
    tmp_path: Path, data: Path, labels: Panel, classes: Panel, tiny_classifier: Classifier
) -> None:
    score([labels, tiny_classifier, classes, labels], data, tmp_path / "out", progress=False)
    row = read(tmp_path / "out")[0]
    alone = [expected(data, one)[0] for one in (labels, classes)]
    np.testing.assert_allclose(told(row, LABELS), alone[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(told(row, CLASSES), alone[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(told(row, tuple(f"{name}_2" for name in LABELS)), alone[0], rtol=0, atol=1e-6)
    assert (row["class_panel3"], row["class_probability_panel3"]) == (
        CLASSES[alone[1].argmax()],
        max(told(row, CLASSES)),
    )
    assert row["label_classifier2"] in (0, 1)
    assert "label_cat" not in row


@pytest.mark.usefixtures("scores_here")
def test_a_stopped_run_goes_on_with_the_same_panel_alone(tmp_path: Path, data: Path, classes: Panel) -> None:
    """Names, temperature and heads all decide what is written."""
    folder, out = classes.save(tmp_path / "animals"), tmp_path / "out"
    by_two = ScoreConfig(shard_size=2)

    def run(panel: Path, **options: object) -> dict:
        return score(panel, data, out, config=by_two, device="cpu", progress=False, **options)

    with pytest.raises(StoppedError, match="1 of 3 shards are kept"):
        run(folder, should_stop=iter([False, True, True]).__next__)
    kept = read(out)
    manifest = folder / "panel.json"
    content = json.loads(manifest.read_text())
    bird = [*content["labels"][:2], {**content["labels"][2], "name": "bird"}]
    for changed in ({"temperature": 1.8}, {"labels": bird}, {"labels": content["labels"][::-1]}, {"one_of": False}):
        manifest.write_text(json.dumps(content | changed))
        with pytest.raises(ConfigError, match=r"was .*, is now "):
            run(folder)
    manifest.write_text(json.dumps(content))
    assert run(folder) == {"rows": ROWS, "errors": 1, "shards_written": 2, "shards_there": 1}
    assert read(out)[:2] == kept


def test_columns_of_one_name_are_refused(tiny_backbone: Backbone) -> None:
    panel = make_panel(tiny_backbone, ("x", "name_x"))
    with pytest.raises(ConfigError, match="two columns of the scores would be called 'label_name_x'; rename a label"):
        ScorerList.of(panel)
