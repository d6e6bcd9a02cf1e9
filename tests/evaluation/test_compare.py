"""Comparison: paired intervals are narrower than unpaired ones, McNemar equals its definition, names are kept."""

import json
import math

import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.compare import compare, mcnemar
from qwen_vl_classifier.evaluation.intervals import bootstrap, bounds, paired_metrics
from qwen_vl_classifier.evaluation.metrics import METRICS, Measure, compute_metrics


def simulated(seed=0, count=400):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    signal = 0.35 + 0.3 * labels + rng.normal(0, 0.2, count)  # what both see
    better, worse = (np.clip(signal + rng.normal(0, noise, count), 0.01, 0.99) for noise in (0.02, 0.2))
    return labels, better, worse


def paired(labels, a, b, **options):
    return paired_metrics(labels, a, b, (0.5, 0.5), np.arange(len(labels)), **({"resamples": 400} | options))


def test_the_better_one_is_named_whichever_side_it_is_on():
    labels, better, worse = simulated()
    assert {name: entry["better"] for name, entry in paired(labels, better, worse).items()}["auroc"] == "A"
    found = paired(labels, worse, better)
    assert found["auroc"]["better"] == found["log_loss"]["better"] == found["brier"]["better"] == "B"
    assert found["auroc"]["difference"] < 0 < found["log_loss"]["difference"]
    values = [compute_metrics(labels, side) for side in (worse, better)]
    for name in METRICS:
        assert (found[name]["a"], found[name]["b"]) == (values[0][name], values[1][name])
        assert found[name]["low"] <= found[name]["difference"] <= found[name]["high"] or name == "ece"


def test_a_classifier_is_no_better_than_itself():
    labels, better, _ = simulated()
    for entry in paired(labels, better, better).values():
        assert (entry["difference"], entry["low"], entry["high"], entry["better"]) == (0.0, 0.0, 0.0, None)


def test_pairing_narrows_the_interval():
    labels, better, worse = simulated()
    found = paired(labels, better, worse)["auroc"]
    apart = [
        bootstrap([Measure(labels, side, 0.5)], np.arange(400), resamples=400, seed=seed)[0]["auroc"]
        for side, seed in ((better, 1), (worse, 2))
    ]
    low, high = bounds(apart[0] - apart[1])
    assert found["high"] - found["low"] < 0.8 * (high - low)


def test_of_one_class_nothing_is_said_where_nothing_is_known():
    found = paired(np.ones(10, dtype=np.int64), np.linspace(0.1, 0.9, 10), np.full(10, 0.7))
    assert found["auroc"] == {"a": None, "b": None, "difference": None, "low": None, "high": None, "better": None}
    assert found["accuracy"]["difference"] == pytest.approx(-0.5)


def test_mcnemar_by_hand():
    right_a = np.array([True] * 12 + [False] * 3)
    right_b = np.array([True] * 5 + [False] * 7 + [True] + [False] * 2)
    found = mcnemar(right_a, right_b)
    assert (found["both"], found["only_a"], found["only_b"], found["neither"]) == (5, 7, 1, 2)
    assert found["p_value"] == pytest.approx(2 * (1 + 8) / 2**8)  # at most one of eight tosses, either way
    assert mcnemar(right_a, right_a)["p_value"] == 1.0
    assert mcnemar(right_a, ~right_a)["p_value"] == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)


def test_two_classifiers_on_real_rows(tiny_classifier, scene_rows):
    other = Classifier(
        tiny_classifier.backbone, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec, threshold=0.0
    )
    examples = scene_rows[:20]
    found = compare(tiny_classifier, other, examples, names=("first", "second"), config=EvaluateConfig(resamples=100))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["a"]["name"], found["b"]["name"]) == ("first", "second")
    assert (found["rows"], found["groups"]) == (20, 10)
    assert found["metrics"]["auroc"]["difference"] == 0.0
    share = np.mean([example.label for example in examples])
    assert found["metrics"]["accuracy"]["b"] == pytest.approx(share)
    test = found["mcnemar"]
    assert test["both"] + test["only_b"] == pytest.approx(20 * share)
    assert "20 rows in 10 groups" in found["notes"][0]
    assert "accuracy" in found["sentence"]


def test_rows_without_label_are_refused(tiny_classifier):
    with pytest.raises(DataError, match="have no label"):
        compare(tiny_classifier, tiny_classifier, [Example(None, "a")])
