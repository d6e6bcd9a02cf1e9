"""The sentence: what comes first, what is claimed, and what is noted beside it."""

import copy

import numpy as np
import pytest

from qwen_vl_classifier.evaluation.checks import CHECKS, not_made
from qwen_vl_classifier.evaluation.intervals import metric_intervals
from qwen_vl_classifier.evaluation.metrics import Measure, baselines, compute_metrics
from qwen_vl_classifier.evaluation.verdict import notes_of, percent, sentence_of, skill_of


def drop(low, value=0.3):
    return {"before": 0.9, "after": 0.9 - value, "drop": value, "low": low, "high": 0.4}


def checked(free):
    low = -0.01 if free else 0.2
    return {"reason": None, "rows": 200, "auroc": drop(low), "accuracy": drop(low), "free": free}


@pytest.fixture
def evaluation():
    nothing = {"total": 0, "shown": []}
    return {
        "rows": {"total": 200, "positives": 90, "groups": 200, "with_picture": 200, "abstained": 0},
        "metrics": {
            "accuracy": {"value": 0.9, "low": 0.85, "high": 0.94},
            "auroc": {"value": 0.9, "low": 0.8, "high": 0.95},
            "log_loss": {"value": 0.7, "low": 0.6, "high": 0.8},
        },
        "baselines": {"majority": {"accuracy": 0.55}, "prior": {"log_loss": 0.69}},
        "confusion": {"true_positive": 80, "false_positive": 10, "false_negative": 10, "true_negative": 100},
        "checks": {name: checked(False) for name in CHECKS},
        "data": {
            "exact_duplicates": {"within": nothing, "training": None},
            "pictures_in_training": None,
            "near_duplicates": {"within": nothing, "training": None, "pictures": 200, "compared": 200},
            "label_conflicts": {"within": nothing, "training": None},
            "trained_on": {"known": True, "total": 0, "shown": [], "estimated_share": 0.0, "note": "none"},
            "label_issues": {"reason": None, "total": 0, "shown": []},
        },
    }


def test_the_verdict_comes_first(evaluation):
    assert sentence_of(evaluation) == (
        "Right on 90.0 % of 200 rows (95 % interval 85.0 % to 94.0 %), better than the 55.0 % of always giving the "
        "more frequent answer."
    )
    assert notes_of(evaluation) == []


def test_what_is_not_shown_is_not_claimed(evaluation):
    evaluation["metrics"]["accuracy"]["low"] = 0.55
    assert "not shown to be better than the 55.0 %" in sentence_of(evaluation)


def test_a_ranking_that_beats_chance_is_told_beside_answers_that_do_not(evaluation):
    evaluation["metrics"]["accuracy"]["low"] = 0.5
    assert "AUROC" in sentence_of(evaluation)
    evaluation["metrics"]["accuracy"]["value"] = 0.5
    assert "AUROC" not in sentence_of(evaluation)
    evaluation["metrics"]["log_loss"]["value"] = 0.6
    assert sentence_of(evaluation).endswith(
        "It ranks the classes better than chance (AUROC 0.900, 95 % interval 0.800 to 0.950)."
    )


def test_pictures_that_do_not_matter_come_before_all(evaluation):
    evaluation["checks"]["images_permuted"] = checked(True)
    assert sentence_of(evaluation).startswith(
        "It is not shown to use the pictures: AUROC 0.900 with each row's own picture, 0.600 with another row's, on "
        "200 rows (drop 0.300, 95 % interval -0.010 to 0.400). Right on 90.0 %"
    )


def test_at_chance_the_figure_comes_first_and_then_the_pictures(evaluation):
    evaluation["metrics"]["accuracy"]["low"] = 0.55
    evaluation["metrics"]["auroc"]["low"] = 0.45
    evaluation["checks"]["images_permuted"] = checked(True)
    sentence = sentence_of(evaluation)
    assert sentence.startswith("Right on 90.0 % of 200 rows")
    assert "more frequent answer. It is not shown to use the pictures: AUROC 0.900" in sentence


def test_a_check_that_was_not_made_claims_nothing(evaluation):
    evaluation["checks"] = {name: not_made("switched off") for name in CHECKS}
    assert sentence_of(evaluation).startswith("Right on")
    assert notes_of(evaluation) == []


@pytest.mark.parametrize("positives", [0, 200])
def test_one_class_alone_is_said(evaluation, positives):
    evaluation["rows"]["positives"] = positives
    only = int(positives > 0)
    assert f"every row is of class {only}, so this says nothing about the other class." in sentence_of(evaluation)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("rows", "groups"), 80, "200 rows in 80 groups"),
        (("rows", "abstained"), 7, "it abstains on 7 rows"),
        (("checks", "texts_permuted"), checked(True), "it is not shown to use the texts: AUROC 0.900"),
        (("rows", "total"), 300, "shuffled on 200 rows drawn at random"),
        (
            ("data", "trained_on"),
            {"total": 3, "note": "at least 3 rows"},
            "at least 3 rows: results look better than they are",
        ),
        (("data", "pictures_in_training"), {"total": 4}, "the pictures of 4 rows are in the training data"),
        (("data", "near_duplicates", "training"), {"total": 5}, "look alike: 5 of pictures here"),
        (("data", "exact_duplicates", "within"), {"total": 6}, "rows that repeat an earlier row: 6"),
        (("data", "label_conflicts", "within"), {"total": 2}, "same pictures and text as another"),
        (("data", "near_duplicates", "compared"), 50, "among 50 of 200 pictures"),
        (("confusion",), {"false_positive": 0, "false_negative": 0}, "no answer is wrong"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_limits_the_numbers_is_noted(evaluation, path, value, words):
    changed = copy.deepcopy(evaluation)
    *parents, last = path
    place = changed
    for name in parents:
        place = place[name]
    place[last] = value
    if path == ("rows", "total"):
        changed["rows"]["with_picture"] = changed["rows"]["groups"] = 300
    (note,) = notes_of(changed)
    assert words in note


def test_percentages_never_round_up_to_all():
    assert percent(0.9999) == "99.9 %"
    assert percent(1.0) == "100.0 %"
    assert percent(0.123) == "12.3 %"


@pytest.mark.parametrize(
    ("noise", "share", "better"), [(0.2, 0.5, True), (9.0, 0.5, False), (0.2, 0.1, True), (9.0, 0.1, False)]
)
def test_who_beats_guessing(noise, share, better):
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < share).astype(np.int64)
    probabilities = 1 / (1 + np.exp(-4 * (labels - 0.5 + noise * rng.normal(size=300))))
    values = compute_metrics(labels, probabilities)
    metrics = metric_intervals(Measure(labels, probabilities, 0.5), values, np.arange(300), resamples=200)
    assert (skill_of(metrics, baselines(labels)) != "none") == better
