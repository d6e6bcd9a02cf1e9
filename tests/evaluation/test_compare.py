"""Comparison: paired intervals are narrower than unpaired ones, McNemar equals its definition, names are kept."""

import copy
import json
import math
from itertools import product

import numpy as np
import pytest

from qwen_vl_classifier import Backbone, Classifier, Example
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.evaluation.compare import compare, mcnemar
from qwen_vl_classifier.evaluation.intervals import bootstrap, bounds, paired_metrics
from qwen_vl_classifier.evaluation.metrics import METRICS, Measure, compute_metrics
from qwen_vl_classifier.evaluation.slices import holm
from qwen_vl_classifier.evaluation.verdict import comparison_sentence
from tests import nano

QUICK = EvaluateConfig(resamples=100)


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
    assert {name: entry["better"] for name, entry in paired(labels, better, worse).items()}["auroc"] == "a"
    found = paired(labels, worse, better)
    assert found["auroc"]["better"] == found["log_loss"]["better"] == found["brier"]["better"] == "b"
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


def test_rows_of_one_group_are_turned_round_together():
    right_a, right_b = np.array([True] * 6 + [False]), np.array([False] * 6 + [True])
    groups = np.array([0, 0, 0, 1, 1, 1, 2])
    assert mcnemar(right_a, right_b, groups)["p_value"] == pytest.approx(4 / 8)  # of +-3 +-3 +-1: 5, -5 and beyond
    assert mcnemar(right_a, right_b)["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(right_a, right_b, np.arange(7)) == mcnemar(right_a, right_b)


def test_the_grouped_test_is_that_of_all_signs():
    rng = np.random.default_rng(0)
    right_a, right_b, groups = rng.random(40) < 0.8, rng.random(40) < 0.5, rng.integers(0, 9, 40)
    ahead = np.bincount(groups, weights=right_a.astype(float) - right_b)
    sums = [
        abs(sum(sign * one for sign, one in zip(signs, ahead, strict=True))) for signs in product((1, -1), repeat=9)
    ]
    share = np.mean(np.array(sums) >= abs(ahead.sum()))
    assert mcnemar(right_a, right_b, groups)["p_value"] == pytest.approx(share)


def always(classifier, label, **changes):
    """Answer every row alike: a threshold that all or no probabilities reach."""
    made = copy.copy(classifier)
    made.threshold = 0.0 if label else 1.1
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_two_classifiers_on_real_rows(tiny_classifier, scene_rows):
    examples = scene_rows[:20]
    found = compare([tiny_classifier, always(tiny_classifier, 1)], examples, names=("first", "second"), config=QUICK)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [one["name"] for one in found["classifiers"]] == ["first", "second"]
    assert (found["rows"]["total"], found["rows"]["groups"]) == (20, 10)
    (pair,) = found["pairs"]
    assert pair["metrics"]["auroc"]["difference"] == 0.0
    share = np.mean([example.label for example in examples])
    assert found["classifiers"][1]["metrics"]["accuracy"]["value"] == pytest.approx(share)
    assert found["classifiers"][1]["confusion"]["false_negative"] == 0
    test = pair["mcnemar"]
    second = "only_b" if found["ranking"] == [0, 1] else "only_a"
    assert test["both"] + test[second] == pytest.approx(20 * share)
    assert test["p_corrected"] == test["p_value"]
    assert "20 rows in 10 groups" in found["notes"][0]
    assert "first" in found["sentence"]
    assert "second" in found["sentence"]
    assert found["correction"] == {"method": None, "comparisons": 1}


@pytest.fixture(scope="module")
def of_three(tiny_backbone, tiny_classifier, scene_rows):
    """Compare a good one, one that answers everything alike, and one of other probabilities."""
    good = Classifier.zero_shot(tiny_backbone)
    return compare(
        [always(tiny_classifier, 1), good, tiny_classifier], scene_rows[:32], names=["a", "b", "c"], config=QUICK
    )


def test_several_are_ranked_and_all_pairs_corrected(of_three):
    accuracies = [one["metrics"]["accuracy"]["value"] for one in of_three["classifiers"]]
    assert of_three["ranking"][0] == 1
    assert sorted(accuracies, reverse=True) == [accuracies[index] for index in of_three["ranking"]]
    assert [of_three["classifiers"][index]["rank"] for index in of_three["ranking"]] == [1, 2, 3]
    assert len(of_three["pairs"]) == 3
    for pair in of_three["pairs"]:
        assert pair["metrics"]["accuracy"]["difference"] >= 0
    chances = [pair["mcnemar"]["p_value"] for pair in of_three["pairs"]]
    assert [pair["mcnemar"]["p_corrected"] for pair in of_three["pairs"]] == holm(chances)
    assert of_three["correction"] == {"method": "Holm", "comparisons": 3}
    assert "Holm" in of_three["notes"][0]
    assert "b is right" in of_three["sentence"]


def test_rows_on_which_answers_differ_come_with_all_answers(of_three, scene_rows):
    rows = of_three["differing"]
    spreads = [max(row["probabilities"]) - min(row["probabilities"]) for row in rows]
    assert spreads == sorted(spreads, reverse=True)
    assert all(set(row["labels"]) == {0, 1} for row in rows)
    named = {row["row"] for row in rows}
    counted = sum(pair["mcnemar"]["only_a"] + pair["mcnemar"]["only_b"] for pair in of_three["pairs"])
    assert len(named) == len(rows) == counted / 2  # of three answers that differ, one differs from the two others
    first = rows[0]
    assert (first["text"], first["label"]) == (scene_rows[first["row"]].text, scene_rows[first["row"]].label)
    assert first["decisions"] == ["yes" if label else "no" for label in first["labels"]]


def test_each_backbone_reads_the_rows_once(tiny_classifier, tiny_backbone, scene_rows, tmp_path):
    other = Backbone.load(nano.make_checkpoint("qwen2_5_vl", tmp_path / "nano"), device="cpu", dtype="float32")
    sides = [Classifier.zero_shot(tiny_backbone), Classifier.zero_shot(other), tiny_classifier]
    rows, encoded = scene_rows[:6], []
    for backbone in (tiny_backbone, other):
        encode = backbone.encode_prepared

        def counted(prepared, *given, encode=encode, **named):
            encoded.append(len(prepared))
            return encode(prepared, *given, **named)

        vars(backbone)["encode_prepared"] = counted
    try:
        found = compare(sides, rows, config=QUICK)
    finally:
        for backbone in (tiny_backbone, other):
            del vars(backbone)["encode_prepared"]
    assert sum(encoded) == 2 * 6
    own = [side.predict_proba(rows)[:, 1] for side in sides]
    for row in found["differing"]:
        np.testing.assert_allclose(row["probabilities"], [side[row["row"]] for side in own], atol=1e-6)
    assert found["differing"]


def test_accuracy_is_better_only_where_the_corrected_test_says_so(of_three):
    for pair in of_three["pairs"]:
        assert (pair["metrics"]["accuracy"]["better"] is None) or pair["mcnemar"]["p_corrected"] < 0.05


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (("a", "a"), "A is right more often than each of the others: 90.0 % of 100 rows."),
        (("a", None), "A is right most often, on 90.0 % of 100 rows. It is shown to be better than B, but not than C."),
        ((None, None), "A is right most often, on 90.0 % of 100 rows, but is not shown to be better than any"),
        (("a",), "A is right more often than B: 90.0 % of 100 rows against 80.0 % (difference 10.0 points, 95 %"),
        ((None,), "Neither is shown to be right more often: A 90.0 % of 100 rows, B 80.0 % (difference 10.0 points"),
    ],
)
def test_the_sentence_claims_what_is_shown(verdicts, sentence):
    values = (0.9, 0.8, 0.7)[: len(verdicts) + 1]
    gap = {"difference": 0.1, "low": 0.0, "high": 0.2}
    comparison = {
        "rows": {"total": 100},
        "classifiers": [
            {"name": name, "metrics": {"accuracy": {"value": value}}}
            for name, value in zip("ABC", values, strict=False)
        ],
        "ranking": [*range(len(values))],
        "pairs": [
            {
                "a": 0,
                "b": other,
                "metrics": {"accuracy": gap | {"better": better}},
            }
            for other, better in enumerate(verdicts, 1)
        ],
    }
    assert comparison_sentence(comparison).startswith(sentence)


def test_what_cannot_be_compared_is_refused(tiny_classifier, scene_rows):
    with pytest.raises(DataError, match="have no label"):
        compare([tiny_classifier, always(tiny_classifier, 1)], [Example(None, "a")])
    with pytest.raises(ConfigError, match="1 to compare; expected at least two classifiers"):
        compare([tiny_classifier], scene_rows[:4])
    unnamed = compare([tiny_classifier] * 2, scene_rows[:4], config=QUICK)
    assert [one["name"] for one in unnamed["classifiers"]] == ["A", "B"]
    with pytest.raises(ConfigError, match="3 names for 2 classifiers"):
        compare([tiny_classifier] * 2, scene_rows[:4], names="abc")
    with pytest.raises(ConfigError, match="'a' names 2 classifiers"):
        compare([tiny_classifier] * 2, scene_rows[:4], names="aa")
    sides = [always(tiny_classifier, 1, label_names=names) for names in (("cat", "dog"), ("dog", "cat"))]
    with pytest.raises(ConfigError, match="class 1 is 'dog' for A and 'cat' for B"):
        compare(sides, scene_rows[:4])
