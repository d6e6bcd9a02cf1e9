"""An evaluation opens each picture once, whatever it asks of it, and leaves out rows that cannot be used."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example, Tap, evaluate, load_examples, train, write_report
from qwen_vl_classifier.backbone import windows
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.evaluation.compare import compare
from qwen_vl_classifier.images import opening as images

pytestmark = pytest.mark.usefixtures("one_thread", "blank_plots")

QUICK = EvaluateConfig(resamples=50, slice_rows=3)


@pytest.fixture
def opened(monkeypatch) -> Counter:
    """How often each file was opened as a picture, wherever in the package."""
    counts: Counter = Counter()
    open_image = images.open_image

    def counting(source, **limits):
        if not isinstance(source, Image.Image):
            counts[str(source)] += 1
        return open_image(source, **limits)

    for name, module in list(sys.modules.items()):
        if name.startswith("qwen_vl_classifier") and getattr(module, "open_image", None) is open_image:
            monkeypatch.setattr(module, "open_image", counting)
    return counts


def write_rows(folder: Path, *, first: int, damaged: tuple[int, ...] = ()) -> Path:
    """Write 12 pictures and 48 rows about them, in random order; no two pictures are alike."""
    folder.mkdir()
    rng = np.random.default_rng(first)
    for number in range(first, first + 12):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(path)
        if number in damaged:
            content = bytearray(path.read_bytes())
            start = content.index(b"IDAT") + 4
            content[start : start + 40] = bytes(40)
            path.write_bytes(content)
    rows = [{"image": f"{first + row % 12}.png", "text": f"text {row}", "label": row % 2} for row in range(48)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(rows[row]) + "\n" for row in rng.permutation(48)))
    return path


def test_evaluate_opens_each_picture_once(tmp_path, tiny_classifier, opened, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 8)
    tiny_classifier.save(tmp_path / "classifier")
    data, known = write_rows(tmp_path / "data", first=0), write_rows(tmp_path / "known", first=50)
    arguments = ["evaluate", tmp_path / "classifier", data, "--out", tmp_path / "report", "--train", known]
    assert main([*map(str, arguments), "--resamples", "50", "--device", "cpu"]) == 0
    assert len(opened) == 24
    assert set(opened.values()) == {1}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") > 10
    assert "cannot be opened" not in page


def test_train_opens_each_picture_once(tmp_path, tiny_backbone, opened, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 8)
    config = TrainConfig(taps="mean:-1", heads="linear", folds=2)
    rows, others = (load_examples(write_rows(tmp_path / str(first), first=first)) for first in (0, 50))
    train(rows, others, backbone=tiny_backbone, config=config, progress=False)
    assert len(opened) == 24
    assert set(opened.values()) == {1}


def test_probabilities_are_those_of_predict_proba_to_the_last_bit(tmp_path, tiny_classifier, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 8)
    rows = load_examples(write_rows(tmp_path / "data", first=0))
    evaluation = evaluate(tiny_classifier, rows, config=QUICK)
    probabilities = tiny_classifier.predict_proba(rows)[:, 1]
    assert [row["probability"] for row in evaluation["predictions"]] == probabilities.tolist()


def test_checks_are_those_of_a_pass_of_their_own(tmp_path, tiny_classifier, monkeypatch):
    """Beside the original, an altered row is what `predict_proba` makes of it."""
    from qwen_vl_classifier.data.bad_rows import BadRows
    from qwen_vl_classifier.data.picture_checks import read_sizes
    from qwen_vl_classifier.evaluation.checks import plan_checks
    from qwen_vl_classifier.evaluation.scoring_pass import Scorer, ThumbnailKeeper, score_once

    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 8)
    rows = [*load_examples(write_rows(tmp_path / "data", first=0)), Example(None, "no picture", 1)]
    planned = plan_checks(rows, read_sizes(rows, BadRows()), np.arange(49), most_rows=30)
    scored = score_once(Scorer.of(tiny_classifier), rows, planned, BadRows(), thumbnails=ThumbnailKeeper())
    for name, altered in planned.items():
        expected = tiny_classifier.predict_proba(altered.examples)[:, 1]
        np.testing.assert_allclose(scored.altered[name][:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_its_own_picture_is_no_other_picture(tmp_path, tiny_classifier):
    for name in "abc":
        Image.new("RGB", (56, 56), "teal").save(tmp_path / f"{name}.png")
    rows = [
        Example(str(tmp_path / f"{name}.png"), f"text {number}", number % 2) for number, name in enumerate("abcabc")
    ]
    evaluation = evaluate(tiny_classifier, rows, config=QUICK)
    assert evaluation["checks"]["images_permuted"]["reason"] == "all rows have the same picture"
    assert evaluation["checks"]["texts_permuted"]["rows"] == 6


def test_rows_are_left_out_and_the_report_says_so(tmp_path, tiny_classifier, capsys):
    tiny_classifier.save(tmp_path / "classifier")
    data = write_rows(tmp_path / "data", first=0, damaged=(3,))
    (tmp_path / "data" / "5.png").write_bytes(b"<html>")
    arguments = ["evaluate", str(tmp_path / "classifier"), str(data), "--resamples", "50", "--device", "cpu"]
    assert main(arguments) == 2
    assert "4 of 48 rows cannot be used:\n  line " in capsys.readouterr().err
    (tmp_path / "data" / "5.png").write_bytes((tmp_path / "data" / "4.png").read_bytes())
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "4 of 48 rows cannot be used:\n  line " in told
    assert "or leave them out with --skip-bad-rows" in told
    assert main([*arguments, "--max-errors", "4", "--out", str(tmp_path / "report")]) == 0
    told = capsys.readouterr()
    assert "left out 4 of 48 rows:\n  line " in told.err
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert evaluation["rows"]["total"] == len(evaluation["predictions"]) == 44
    assert evaluation["left_out"]["total"] == 4
    note = next(
        note for note in evaluation["notes"] if note.startswith("4 of 48 rows cannot be used and were left out")
    )
    assert note[:40] in (tmp_path / "report" / "summary.md").read_text()
    rows = load_examples(data)
    bad = [position for position, row in enumerate(rows) if str(row.image).endswith("/3.png")]
    assert evaluation["left_out"]["positions"] == bad


def test_a_report_takes_the_rows_as_they_were_given(tmp_path, tiny_classifier):
    rows = load_examples(write_rows(tmp_path / "data", first=0, damaged=(3,)))
    with pytest.raises(ImageError, match=r"^4 of 48 rows cannot be used"):
        evaluate(tiny_classifier, rows, config=QUICK)
    evaluation = evaluate(tiny_classifier, rows, config=EvaluateConfig(resamples=50, max_errors="10%"))
    assert write_report(evaluation, tmp_path / "report", examples=rows).is_file()


def test_a_comparison_of_one_backbone_opens_each_picture_once_and_leaves_rows_out(tmp_path, tiny_classifier, opened):
    other = copy.copy(tiny_classifier)
    other.tap = Tap(2, "mean")
    rows = load_examples(write_rows(tmp_path / "data", first=0, damaged=(3,)))
    with pytest.raises(ImageError, match=r"^4 of 48 rows cannot be used"):
        compare([tiny_classifier, other], rows)
    opened.clear()
    comparison = compare([tiny_classifier, other], rows, config=EvaluateConfig(resamples=50, max_errors="10%"))
    assert set(opened.values()) == {1}
    assert comparison["rows"]["total"] == 44
    assert comparison["left_out"]["total"] == 4
    assert any("were left out" in note for note in comparison["notes"])
