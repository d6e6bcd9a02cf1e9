"""What Python callers give: every verb takes what `load_examples` takes, and says which row cannot be used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import (
    Classifier,
    EvaluateConfig,
    Example,
    Panel,
    TrainConfig,
    compare,
    evaluate,
    explain,
    extract_features,
    score,
    train,
)
from qwen_vl_classifier.data.loading import as_examples
from qwen_vl_classifier.errors import DataError

PICTURES = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green", "white", "black", "yellow")]
ROWS = [
    {"image": PICTURES[number % 6], "text": f"It is red, said number {number}.", "label": ("no", "yes")[number % 2]}
    for number in range(24)
]
EXAMPLES = [Example(row["image"], row["text"], number % 2, fields={}) for number, row in enumerate(ROWS)]
QUICK = EvaluateConfig(checks=False, resamples=20)


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def frame():
    return pytest.importorskip("pandas").DataFrame(columns_of(ROWS))


@pytest.fixture(scope="module")
def named(tiny_classifier) -> Classifier:
    """A classifier that calls its classes "no" and "yes"."""
    parts = {name: getattr(tiny_classifier, name) for name in ("backbone", "tap", "head", "spec")}
    return Classifier(**parts, label_names=("no", "yes"))


@pytest.mark.parametrize(
    "given", [ROWS, tuple(ROWS), EXAMPLES, frame, lambda: iter(ROWS), lambda: (one for one in EXAMPLES)]
)
def test_every_form_gives_the_same_probabilities(named, given):
    given = given() if callable(given) else given
    expected = named.predict_proba(EXAMPLES)
    np.testing.assert_allclose(named.predict_proba(given), expected, atol=1e-6)


def test_one_alone(named):
    expected = named.predict_proba(EXAMPLES[:1])
    for one in (EXAMPLES[0], ROWS[0]):
        np.testing.assert_allclose(named.predict_proba(one), expected, atol=1e-6)
        assert len(named.decide(one)) == len(named.predict(one)) == 1
        assert Panel([named]).predict_proba(one).shape == (1, 1)
        assert explain(named, one, method="tokens").probability == pytest.approx(expected[0, 1], abs=1e-5)


VERBS = {
    "predict_proba": lambda classifier, rows, out: classifier.predict_proba(rows),
    "predict": lambda classifier, rows, out: classifier.predict(rows),
    "decide": lambda classifier, rows, out: classifier.decide(rows),
    "calibrate": lambda classifier, rows, out: classifier.calibrate(rows),
    "panel": lambda classifier, rows, out: Panel([classifier]).predict_proba(rows),
    "train": lambda classifier, rows, out: train(rows, backbone=classifier.backbone, progress=False),
    "validation": lambda classifier, rows, out: train(EXAMPLES, rows, backbone=classifier.backbone, progress=False),
    "evaluate": lambda classifier, rows, out: evaluate(classifier, rows, config=QUICK),
    "compare": lambda classifier, rows, out: compare([classifier, classifier], rows, config=QUICK),
    "explain": lambda classifier, rows, out: explain(classifier, rows[-1:]),
    "extract": lambda classifier, rows, out: extract_features(rows, classifier.backbone, [classifier.tap]),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("text", [None, float("nan"), 7, ["words"], b"words", "half \ud83d"])
@pytest.mark.parametrize("form", [dict, Example])
def test_a_text_that_is_none_names_its_row(tiny_classifier, tmp_path, verb, text, form):
    rows = [*EXAMPLES[:3], dataclasses.replace(EXAMPLES[3], text=text)]
    if form is dict:
        rows = [{"image": one.image, "text": one.text, "label": one.label} for one in rows]
    number = 1 if verb == "explain" else 4
    with pytest.raises(DataError, match=rf"row {number}: text (is|holds) .+, expected "):
        VERBS[verb](tiny_classifier, rows, tmp_path)


def test_a_text_that_is_none_is_an_error_of_its_row_in_score(tiny_classifier, tmp_path):
    rows = [Example(None, "fine"), Example(None, None), {"image": None, "text": float("nan")}]
    assert score(tiny_classifier, rows, tmp_path / "out", progress=False)["errors"] == 2


def test_score_takes_a_frame_and_one_alone(tiny_classifier, tmp_path):
    assert score(tiny_classifier, frame(), tmp_path / "a", progress=False) == {
        "rows": 24,
        "errors": 0,
        "shards_written": 1,
        "shards_there": 0,
    }
    assert score(tiny_classifier, EXAMPLES[0], tmp_path / "b", progress=False)["rows"] == 1


def test_evaluate_reads_the_words_of_the_classifier(named):
    by_words, by_class = evaluate(named, ROWS, config=QUICK), evaluate(named, EXAMPLES, config=QUICK)
    assert by_words["rows"] == by_class["rows"]
    assert [row["label"] for row in by_words["predictions"]] == [number % 2 for number in range(24)]
    with pytest.raises(DataError, match=r"label is 'maybe', expected 'no' or 'yes'"):
        evaluate(named, [*ROWS, ROWS[0] | {"label": "maybe"}], config=QUICK)


@pytest.mark.parametrize(
    "wrap", [np.array, torch.tensor, lambda label: np.array([label]), lambda label: torch.tensor([[label]])]
)
def test_labels_of_one_element_arrays(tiny_classifier, wrap):
    examples = [dataclasses.replace(one, label=wrap(one.label)) for one in EXAMPLES]
    assert [one.label for one in as_examples(examples)] == [number % 2 for number in range(24)]
    assert evaluate(tiny_classifier, examples, config=QUICK)["rows"]["positives"] == 12
    with pytest.raises(DataError, match=r"row 1: label is of type (ndarray|Tensor), expected a number from 0 to 1"):
        evaluate(tiny_classifier, [dataclasses.replace(EXAMPLES[0], label=np.array([0, 1]))], config=QUICK)


def test_train_calls_classes_by_the_words_that_are_given(tiny_backbone):
    config = TrainConfig(taps="mean:-1", heads="linear")
    result = train(ROWS, backbone=tiny_backbone, config=config, label_names=("no", "yes"), progress=False)
    assert result.classifier.label_names == ("no", "yes")
    with pytest.raises(DataError, match="label is 'yes', expected a number from 0 to 1"):
        train(ROWS, backbone=tiny_backbone, config=config, progress=False)


def test_a_list_of_examples_is_not_copied():
    assert as_examples(EXAMPLES) is EXAMPLES
    assert as_examples(EXAMPLES, read_labels=False) is EXAMPLES


def test_what_is_no_row_is_refused(tiny_classifier):
    for given in (None, 7, b"bytes", {"train": ROWS}):
        with pytest.raises(DataError, match="got a"):
            tiny_classifier.predict_proba(given)
    with pytest.raises(DataError, match="row 2: a str, expected a dict or an Example"):
        tiny_classifier.predict_proba([EXAMPLES[0], "a claim"])
    with pytest.raises(DataError, match="got 2 rows; expected one example"):
        explain(tiny_classifier, EXAMPLES[:2])
