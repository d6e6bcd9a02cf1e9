"""Metrics: scikit-learn's own functions and numbers worked out by hand, one class alone, ties at the threshold."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as reference

from qwen_vl_classifier.evaluation.metrics import compute_metrics, metrics_table


def compute(labels, probabilities, threshold=0.5):
    return compute_metrics(np.array(labels), np.array(probabilities, dtype=np.float64), threshold)


def test_metrics_by_hand():
    # Of class 1: found at 0.9, missed at 0.4. Of class 0: mistaken at 0.6, right at 0.2 and 0.1.
    found = compute([1, 1, 0, 0, 0], [0.9, 0.4, 0.6, 0.2, 0.1])
    assert found["rows"] == 5
    assert found["positives"] == 2
    assert found["confusion"] == {
        "true_negative": 2,
        "false_positive": 1,
        "false_negative": 1,
        "true_positive": 1,
    }
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["majority_accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(1 / 2)  # precision 1/2, recall 1/2
    assert found["auroc"] == pytest.approx(5 / 6)  # of 2 x 3 pairs only (0.4, 0.6) is in the wrong order
    assert found["log_loss"] == pytest.approx(-math.log(0.9 * 0.4 * 0.4 * 0.8 * 0.9) / 5)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.73])
@pytest.mark.parametrize("digits", [1, 8])  # one digit: many equal probabilities
def test_metrics_equal_scikit_learn(threshold, digits):
    rng = np.random.default_rng(digits)
    labels = (rng.random(300) < 0.3).astype(np.int64)
    probabilities = np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0.05, 0.95).round(digits)
    predicted = (probabilities >= threshold).astype(int)
    found = compute_metrics(labels, probabilities, threshold)
    assert found["threshold"] == threshold
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(reference.f1_score(labels, predicted))
    assert found["auroc"] == pytest.approx(reference.roc_auc_score(labels, probabilities))
    assert found["log_loss"] == pytest.approx(reference.log_loss(labels, probabilities))
    assert list(found["confusion"].values()) == reference.confusion_matrix(labels, predicted).ravel().tolist()


def test_a_probability_at_the_threshold_counts_as_class_1():
    found = compute([1, 0, 1], [0.7, 0.7, 0.6999], threshold=0.7)
    assert found["confusion"] == {
        "true_negative": 0,
        "false_positive": 1,
        "false_negative": 1,
        "true_positive": 1,
    }


def test_equal_probabilities_make_an_auroc_of_one_half():
    assert compute([0, 1, 0, 1], [0.3] * 4)["auroc"] == 0.5


@pytest.mark.parametrize(("label", "right"), [(0, 1 / 3), (1, 2 / 3)])
def test_one_class_alone_has_no_auroc(label, right):
    found = compute([label] * 3, [0.1, 0.6, 0.8])
    assert found["auroc"] is None
    assert found["accuracy"] == pytest.approx(right)
    assert found["majority_accuracy"] == 1.0
    assert found["f1"] == pytest.approx(0.8 if label else 0.0)
    assert sum(found["confusion"].values()) == 3
    assert "n/a (one class only)" in metrics_table(found)


def test_sure_mistakes_have_a_finite_log_loss():
    assert 30 < compute([1, 0], [0.0, 1.0])["log_loss"] < 50


def test_metrics_are_plain_values():
    found = compute([0, 1], [0.2, 0.7])
    assert json.loads(json.dumps(found)) == found


def test_the_table_shows_every_count_within_80_columns():
    labels, probabilities = np.repeat([0, 0, 1, 1], [70_001, 2, 3, 40]), np.repeat([0.1, 0.9] * 2, [70_001, 2, 3, 40])
    table = metrics_table(compute_metrics(labels, probabilities))
    assert max(map(len, table.splitlines())) <= 80
    assert [line.split()[-2:] for line in table.splitlines()[-2:]] == [["70001", "2"], ["3", "40"]]
