"""Curves: scikit-learn's own, counts by hand, and at most as many points as a plot can show."""

import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from qwen_vl_classifier.classifier.probabilities import expected_calibration_error
from qwen_vl_classifier.evaluation.curves import (
    Counts,
    cost,
    curves,
    histogram,
    precision_recall,
    reliability,
    risk_coverage,
    roc,
    threshold_table,
)


def rows(count=150, digits=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return labels, np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0.01, 0.99).round(digits)


def test_roc_equals_scikit_learn():
    labels, probabilities = rows()
    found = roc(Counts(labels, probabilities))
    alarms, hits, thresholds = roc_curve(labels, probabilities, drop_intermediate=False)
    np.testing.assert_allclose(found["false_positive_rate"], alarms)
    np.testing.assert_allclose(found["true_positive_rate"], hits)
    np.testing.assert_allclose(found["threshold"], np.minimum(thresholds, 1))


def test_precision_and_recall_equal_scikit_learn():
    labels, probabilities = rows()
    found = precision_recall(Counts(labels, probabilities))
    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    np.testing.assert_allclose(found["precision"], precision[:-1][::-1])
    np.testing.assert_allclose(found["recall"], recall[:-1][::-1])
    np.testing.assert_allclose(found["threshold"], thresholds[::-1])


def test_reliability_adds_up_to_the_calibration_error():
    labels, probabilities = rows(500, digits=8)
    found = reliability(labels, probabilities)
    assert len(found["count"]) == 10
    assert sum(found["count"]) == 500
    assert max(found["count"]) - min(found["count"]) <= 1
    gaps = np.abs(np.array(found["probability"]) - found["share"])
    assert np.average(gaps, weights=found["count"]) == pytest.approx(expected_calibration_error(probabilities, labels))
    assert all(
        low <= share <= high for low, share, high in zip(found["low"], found["share"], found["high"], strict=True)
    )


def test_equal_probabilities_are_one_bin():
    found = reliability(np.array([0, 1, 1, 1]), np.full(4, 0.5))
    assert (found["probability"], found["share"], found["count"]) == ([0.5], [0.75], [4])


def test_histogram_counts_each_class():
    found = histogram(np.array([0, 0, 1, 1]), np.array([0.0, 0.26, 0.26, 1.0]), 0.5)
    assert found["edges"] == pytest.approx(np.arange(21) / 20)
    assert found["class_0"] == [1, 0, 0, 0, 0, 1, *[0] * 14]
    assert found["class_1"] == [0, 0, 0, 0, 0, 1, *[0] * 13, 1]


@pytest.mark.parametrize(
    ("probabilities", "threshold", "ends"),
    [
        ([0.451, 0.463], 0.455, (0.451, 0.463)),
        ([0.451, 0.463], 0.53, (0.45, 0.53)),
        ([0.2, 0.9], 0.5, (0.2, 0.9)),
        ([0.5, 0.5], 0.5, (0.5, 0.501)),
        ([1.0, 1.0], 1.0, (0.999, 1.0)),
    ],
)
def test_histogram_spans_the_range_that_is_used(probabilities, threshold, ends):
    found = histogram(np.array([0, 1]), np.array(probabilities), threshold)
    assert (found["edges"][0], found["edges"][-1]) == pytest.approx(ends)
    assert len(found["edges"]) <= 21
    assert [sum(found["class_0"]), sum(found["class_1"])] == [1, 1]


def test_risk_and_coverage_by_hand():
    # From the surest: right, right, wrong, right, wrong.
    labels = np.array([1, 0, 0, 1, 0])
    probabilities = np.array([0.99, 0.02, 0.9, 0.7, 0.6])
    found = risk_coverage(labels, probabilities, 0.5, (0.4, 0.65))
    assert found["coverage"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])
    assert found["area"] == pytest.approx(np.mean([0, 0, 1 / 3, 1 / 4, 2 / 5]))
    assert found["stored"] == {"coverage": 0.8, "risk": 0.25, "band": [0.4, 0.65]}
    assert risk_coverage(labels, probabilities, 0.5, None)["stored"] is None
    assert risk_coverage(labels, probabilities, 0.5, (0.0, 1.0))["stored"]["risk"] is None


def test_rows_that_are_equally_sure_are_answered_together():
    found = risk_coverage(np.array([0, 1, 1]), np.array([0.9, 0.9, 0.9]), 0.5, None)
    assert found["coverage"] == [1.0]
    assert found["risk"] == pytest.approx([1 / 3])


def test_costs_by_hand_and_in_order():
    labels, probabilities = rows()
    found = cost(Counts(labels, probabilities), 0.5)
    weight = np.array(found["miss_weight"])
    misses = ((probabilities < 0.5) & (labels == 1)).sum()
    alarms = ((probabilities >= 0.5) & (labels == 0)).sum()
    np.testing.assert_allclose(found["stored"], (weight * misses + (1 - weight) * alarms) / len(labels))
    place = 79  # a miss costs 0.8, a false alarm 0.2
    assert weight[place] == pytest.approx(0.8)
    low = probabilities >= 1 - weight[place]
    expected = 0.8 * (~low & (labels == 1)).sum() + 0.2 * (low & (labels == 0)).sum()
    assert found["calibrated"][place] == pytest.approx(expected / len(labels))
    for name in ("stored", "calibrated", "trivial"):
        assert (np.array(found["best"]) <= np.array(found[name]) + 1e-12).all()


def test_the_threshold_table_counts_as_scikit_learn_does():
    labels, probabilities = rows(digits=8)
    table = threshold_table(labels, probabilities, 0.4321)
    at = [line["threshold"] for line in table]
    assert at == sorted(set(at))
    assert len(table) <= 201
    assert {0.0, 0.01, 0.5, 1.0, 0.4321} <= set(at)
    for line in table[::20]:
        matrix = confusion_matrix(labels, probabilities >= line["threshold"]).ravel().tolist()
        assert [line["tn"], line["fp"], line["fn"], line["tp"]] == matrix


def test_the_table_resolves_where_probabilities_crowd():
    labels, _ = rows(1000)
    probabilities = np.linspace(0.4999, 0.5001, 1000)
    counts = {line["tp"] for line in threshold_table(labels, probabilities, 0.5)}
    assert len(counts) > 80


def test_a_million_rows_are_few_points():
    labels, probabilities = rows(50_000, digits=8)
    found = curves(labels, probabilities, 0.5, None)
    assert len(found["roc"]["threshold"]) == len(found["pr"]["recall"]) == 200
    assert len(found["risk_coverage"]["risk"]) == 200
    assert (found["roc"]["false_positive_rate"][0], found["roc"]["true_positive_rate"][-1]) == (0, 1)
    assert found["pr"]["recall"][-1] == found["risk_coverage"]["coverage"][-1] == 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_neither_roc_nor_precision_and_recall(label):
    found = curves(np.full(5, label), np.linspace(0.1, 0.9, 5), 0.5, None)
    assert found["roc"] is found["pr"] is None
    assert sum(found["histogram"][f"class_{label}"]) == 5
    assert found["cost"]["trivial"] == pytest.approx([0.0] * 99)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
