"""Metrics: scikit-learn's own functions and numbers worked out by hand, one class alone, ties, many weightings."""

import json
import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.dummy import DummyClassifier

from qwen_vl_classifier.classifier.probabilities import expected_calibration_error
from qwen_vl_classifier.evaluation.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    Measure,
    baselines,
    compute_metrics,
    confusion,
    interval_json,
    rounded,
)


def compute(labels, probabilities, threshold=0.5):
    return compute_metrics(np.array(labels), np.array(probabilities, dtype=np.float64), threshold)


def by_scikit_learn(labels, probabilities, threshold, weights=None):
    answers = (probabilities >= threshold).astype(int)
    precision, recall, f1, _ = reference.precision_recall_fscore_support(
        labels, answers, labels=[0, 1], sample_weight=weights, zero_division=0
    )
    return {
        "accuracy": reference.accuracy_score(labels, answers, sample_weight=weights),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, answers, sample_weight=weights),
        "precision_1": precision[1],
        "recall_1": recall[1],
        "f1_1": f1[1],
        "precision_0": precision[0],
        "recall_0": recall[0],
        "f1_0": f1[0],
        "mcc": reference.matthews_corrcoef(labels, answers, sample_weight=weights),
        "auroc": reference.roc_auc_score(labels, probabilities, sample_weight=weights),
        "average_precision": reference.average_precision_score(labels, probabilities, sample_weight=weights),
        "log_loss": reference.log_loss(labels, probabilities, sample_weight=weights),
        "brier": reference.brier_score_loss(labels, probabilities, sample_weight=weights),
    }


def rows(seed, count=300, digits=8):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.int64)
    return labels, np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0.05, 0.95).round(digits)


def test_metrics_by_hand():
    # Of class 1: found at 0.9, missed at 0.4. Of class 0: mistaken at 0.6, right at 0.2 and 0.1.
    found = compute([1, 1, 0, 0, 0], [0.9, 0.4, 0.6, 0.2, 0.1])
    assert tuple(found) == METRICS
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (found["precision_1"], found["recall_1"], found["f1_1"]) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert (found["precision_0"], found["recall_0"], found["f1_0"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found["mcc"] == pytest.approx((1 * 2 - 1 * 1) / math.sqrt(2 * 2 * 3 * 3))
    assert found["auroc"] == pytest.approx(5 / 6)  # of 2 x 3 pairs only (0.4, 0.6) is in the wrong order
    assert found["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["log_loss"] == pytest.approx(-math.log(0.9 * 0.4 * 0.4 * 0.8 * 0.9) / 5)
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.04 + 0.01) / 5)
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.2 + 0.1) / 5)  # every row alone in its bin


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.73])
@pytest.mark.parametrize("digits", [1, 8])  # one digit: many equal probabilities
def test_metrics_equal_scikit_learn(threshold, digits):
    labels, probabilities = rows(digits, digits=digits)
    found = compute_metrics(labels, probabilities, threshold)
    expected = by_scikit_learn(labels, probabilities, threshold)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["ece"] == pytest.approx(expected_calibration_error(probabilities, labels))


@pytest.mark.parametrize("digits", [1, 8])
def test_weightings_equal_scikit_learn_with_weights(digits):
    labels, probabilities = rows(digits, count=80, digits=digits)
    weights = np.random.default_rng(0).integers(0, 4, (5, 80)).astype(np.float64)
    found = Measure(labels, probabilities, 0.5)(weights)
    assert tuple(found) == METRICS
    for line, weight in enumerate(weights):
        expected = by_scikit_learn(labels, probabilities, 0.5, weight)
        assert {name: found[name][line] for name in expected} == pytest.approx(expected)


def test_a_weight_of_two_is_a_row_twice():
    labels, probabilities = rows(0, count=40)
    weights = np.random.default_rng(1).integers(0, 3, 40)
    found = Measure(labels, probabilities, 0.5)(weights[None].astype(np.float64))
    repeated = np.repeat(np.arange(40), weights)
    # ECE alone differs: its bins are those of the rows as they are.
    alone = compute_metrics(labels[repeated], probabilities[repeated], 0.5)
    assert {name: found[name][0] for name in METRICS if name != "ece"} == pytest.approx(
        {name: alone[name] for name in METRICS if name != "ece"}
    )


def test_a_probability_at_the_threshold_counts_as_class_1():
    counts = confusion(np.array([1, 0, 1]), np.array([0.7, 0.7, 0.6999]), 0.7)
    assert counts == {"true_positive": 1, "false_positive": 1, "false_negative": 1, "true_negative": 0}
    assert compute([1, 0, 1], [0.7, 0.7, 0.6999], threshold=0.7)["accuracy"] == pytest.approx(1 / 3)


def test_equal_probabilities_make_an_auroc_of_one_half():
    found = compute([0, 1, 0, 1], [0.3] * 4)
    assert found["auroc"] == 0.5
    assert found["average_precision"] == 0.5


@pytest.mark.parametrize(("label", "right"), [(0, 1 / 3), (1, 2 / 3)])
def test_one_class_alone(label, right):
    found = compute([label] * 3, [0.1, 0.6, 0.8])
    assert found["auroc"] is None
    assert found["accuracy"] == found["balanced_accuracy"] == found[f"recall_{label}"] == pytest.approx(right)
    assert found[f"recall_{1 - label}"] is found[f"f1_{1 - label}"] is None
    assert found[f"precision_{label}"] == 1.0
    assert found[f"precision_{1 - label}"] == 0.0
    assert found["mcc"] == 0.0
    assert (found["average_precision"] is None) == (label == 0)
    assert sum(confusion(np.full(3, label), np.array([0.1, 0.6, 0.8]), 0.5).values()) == 3


@pytest.mark.parametrize("answer", [0, 1])
def test_a_class_that_is_never_answered_has_a_precision_of_0(answer):
    found = compute([0, 1, 1], [0.2, 0.3, 0.4], threshold=0.0 if answer else 1.0)
    assert found[f"precision_{1 - answer}"] == 0.0
    assert found[f"f1_{1 - answer}"] == 0.0
    assert found["mcc"] == 0.0


def test_sure_mistakes_have_a_finite_log_loss():
    assert 30 < compute([1, 0], [0.0, 1.0])["log_loss"] < 50


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute([1], [0.0])
        baselines(np.array([1]))


def test_metrics_are_plain_values():
    found = compute([0, 1], [0.2, 0.7])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_baselines_are_those_of_scikit_learn(share):
    labels = (np.arange(10) < 10 * share).astype(np.int64)
    found = baselines(labels)
    for name, strategy in (("majority", "most_frequent"), ("prior", "prior")):
        dummy = DummyClassifier(strategy=strategy).fit(np.zeros((10, 1)), labels)
        accuracy = dummy.score(np.zeros((10, 1)), labels)
        assert found[name]["accuracy"] == pytest.approx(accuracy)
    if 0 < share < 1:
        assert found["majority"]["log_loss"] is None
        assert found["prior"]["log_loss"] == pytest.approx(
            -(share * math.log(share) + (1 - share) * math.log1p(-share))
        )
        assert found["prior"]["brier"] == pytest.approx(share * (1 - share))
        assert found["majority"]["brier"] == pytest.approx(min(share, 1 - share))
        assert found["prior"]["auroc"] == found["majority"]["auroc"] == 0.5
    assert found["prior"]["ece"] == pytest.approx(0.0, abs=1e-12)
    assert tuple(found["majority"]) == tuple(found["prior"]) == METRICS


def test_less_is_better_of_losses_alone():
    good, bad = compute([0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8]), compute([0, 1, 0, 1], [0.6, 0.4, 0.7, 0.45])
    assert {name for name in METRICS if good[name] < bad[name]} == LOWER_IS_BETTER


def test_what_is_not_known_is_shown_as_such():
    assert rounded(None) == "n/a"
    assert rounded(0.12345) == "0.123"
    assert interval_json(None, 0.1, 0.2) == {"value": None, "low": None, "high": None}
    assert interval_json(0.5, float("nan"), 0.2) == {"value": 0.5, "low": None, "high": 0.2}
