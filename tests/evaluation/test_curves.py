"""Curves of a report: by hand, against counting, and where a class or a bin is missing."""

import json

import numpy as np
import pytest
from sklearn.metrics import auc

from qwen_vl_classifier.evaluation.metrics import compute_metrics
from qwen_vl_classifier.evaluation.report.curves import histogram, reliability, roc


def sample(rows=500, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.4).astype(np.int64)
    return labels, rng.beta(1 + 2 * labels, 3 - 2 * labels)


def test_roc_by_hand():
    curve = roc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.5, 0.9]))
    assert curve == {"false_positive_rate": [0, 0, 0.5, 0.5, 1], "true_positive_rate": [0, 0.5, 0.5, 1, 1]}


@pytest.mark.parametrize("rows", [500, 20_000])
def test_roc_covers_the_area_of_the_metric_with_few_points(rows):
    labels, probabilities = sample(rows)
    curve = roc(labels, probabilities)
    across, up = curve["false_positive_rate"], curve["true_positive_rate"]
    assert len(across) == len(up) <= 400
    assert (across[0], up[0], across[-1], up[-1]) == (0, 0, 1, 1)
    assert auc(across, up) == pytest.approx(compute_metrics(labels, probabilities)["auroc"], abs=2e-3)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_roc_but_the_rest(label):
    labels, probabilities = np.full(3, label), np.array([0.05, 0.06, 0.99])
    assert roc(labels, probabilities) is None
    assert reliability(labels, probabilities) == [
        {"probability": pytest.approx(0.055), "share": label, "count": 2},
        {"probability": 0.99, "share": label, "count": 1},
    ]
    assert sum(histogram(labels, probabilities)[f"class_{1 - label}"]) == 0


def test_reliability_equals_counting():
    labels, probabilities = sample()
    bins = reliability(labels, probabilities, bins=5)
    assert sum(entry["count"] for entry in bins) == len(labels)
    for number, entry in enumerate(bins):
        inside = (probabilities > number / 5) & (probabilities <= (number + 1) / 5)
        assert entry["count"] == inside.sum()
        assert entry["share"] == pytest.approx(labels[inside].mean())
        assert entry["probability"] == pytest.approx(probabilities[inside].mean())


def test_probabilities_on_the_edges_of_bins_are_counted_once():
    edges = np.linspace(0, 1, 11)
    labels = np.arange(11) % 2
    assert sum(entry["count"] for entry in reliability(labels, edges)) == 11
    counts = histogram(labels, edges)
    assert len(counts["class_0"]) == len(counts["class_1"]) == 20
    assert sum(counts["class_0"]) == 6
    assert sum(counts["class_1"]) == 5


def test_histogram_by_hand():
    found = histogram(np.array([0, 0, 1, 1]), np.array([0.0, 0.3, 0.3, 1.0]), bins=4)
    assert found == {"class_0": [1, 1, 0, 0], "class_1": [0, 1, 0, 1]}


def test_curves_are_plain_values():
    labels, probabilities = sample(50)
    for curve in (roc(labels, probabilities), reliability(labels, probabilities), histogram(labels, probabilities)):
        assert json.loads(json.dumps(curve, allow_nan=False)) == curve
