"""Intervals: a plain loop gives the same, groups stay whole, and they cover what they should."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from qwen_vl_classifier.evaluation.intervals import bootstrap, bounds, metric_intervals
from qwen_vl_classifier.evaluation.metrics import Measure, compute_metrics
from qwen_vl_classifier.training import uncertainty
from qwen_vl_classifier.training.uncertainty import resampled, wilson


def simulated(rng, count=60, groups=None):
    labels = rng.integers(0, 2, count)
    probabilities = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0.01, 0.99).round(2)
    return labels, probabilities, np.arange(count) if groups is None else groups


def test_a_plain_loop_gives_the_same():
    labels, probabilities, groups = simulated(np.random.default_rng(0), groups=np.repeat(np.arange(20), 3))
    (draws,) = bootstrap([Measure(labels, probabilities, 0.5)], groups, resamples=50, seed=3)
    drawn = np.random.default_rng(3).integers(0, 20, (50, 20))
    members = [np.flatnonzero(groups == group) for group in range(20)]
    for line, choice in enumerate(drawn):
        rows = np.concatenate([members[group] for group in choice])
        plain = compute_metrics(labels[rows], probabilities[rows], 0.5)
        for name in plain:
            if name != "ece":  # its bins are those of the whole data
                assert draws[name][line] == pytest.approx(plain[name]), name
        assert draws["auroc"][line] == pytest.approx(roc_auc_score(labels[rows], probabilities[rows]))
        assert draws["average_precision"][line] == pytest.approx(
            average_precision_score(labels[rows], probabilities[rows])
        )


def test_rows_of_a_group_are_drawn_together():
    groups = np.array([0, 1, 0, 2, 1, 0])
    for weights in resampled(groups, 200):
        assert (weights[:, 0] == weights[:, 2]).all()
        assert (weights[:, 1] == weights[:, 4]).all()
        assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_pieces_change_nothing(monkeypatch):
    labels, probabilities, groups = simulated(np.random.default_rng(0))
    measure = Measure(labels, probabilities, 0.5)
    (whole,) = bootstrap([measure], groups, resamples=40, seed=1)
    monkeypatch.setattr(uncertainty, "_CELLS", 7 * 60)
    (pieces,) = bootstrap([measure], groups, resamples=40, seed=1)
    for name in whole:
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-12)


def test_memory_does_not_grow_with_the_resamples():
    labels, probabilities, groups = simulated(np.random.default_rng(0), count=5_000)
    measure = Measure(labels, probabilities, 0.5)
    tracemalloc.start()
    bootstrap([measure], groups, resamples=1_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6  # all weights at once would be 40 MB, with their copies 300 MB


def test_group_numbers_may_have_gaps():
    labels, probabilities, groups = simulated(np.random.default_rng(0))
    measure = Measure(labels, probabilities, 0.5)
    (first,) = bootstrap([measure], groups, resamples=10)
    (second,) = bootstrap([measure], groups * 10 + 5, resamples=10)
    assert (first["auroc"] == second["auroc"]).all()


def test_values_lie_within_their_intervals():
    labels, probabilities, groups = simulated(np.random.default_rng(5), count=200)
    values = compute_metrics(labels, probabilities)
    found = metric_intervals(Measure(labels, probabilities, 0.5), values, groups, resamples=500)
    assert found.keys() == values.keys()
    for name, entry in found.items():
        assert entry["low"] <= entry["value"] == values[name] <= entry["high"]
        assert entry["low"] < entry["high"]


def test_no_value_has_no_interval():
    labels, probabilities = np.ones(12, dtype=np.int64), np.linspace(0.1, 0.9, 12)
    values = compute_metrics(labels, probabilities)
    found = metric_intervals(Measure(labels, probabilities, 0.5), values, np.arange(12), resamples=50)
    assert found["auroc"] == {"value": None, "low": None, "high": None}
    assert found["accuracy"]["low"] < 0.5 < found["accuracy"]["high"]


def test_all_right_is_not_certain():
    labels, groups = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    probabilities = labels * 0.8 + 0.1
    found = metric_intervals(
        Measure(labels, probabilities, 0.5), compute_metrics(labels, probabilities), groups, resamples=50
    )
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == wilson(3, 3)
    assert (found["recall_0"]["low"], found["recall_0"]["high"]) == wilson(1, 1)
    assert (found["precision_1"]["low"], found["precision_1"]["high"]) == wilson(2, 2)


@pytest.mark.parametrize("rows", [2, 6, 40, 400])
@pytest.mark.parametrize("right", [True, False])
def test_a_value_at_the_end_of_its_scale_has_a_width_that_shrinks_with_rows(rows, right):
    labels = np.arange(rows) % 2
    probabilities = np.where(labels == right, 0.9, 0.1)
    values = compute_metrics(labels, probabilities)
    found = metric_intervals(Measure(labels, probabilities, 0.5), values, np.arange(rows), resamples=50)
    for name in ("balanced_accuracy", "f1_1", "f1_0", "mcc", "auroc", *(["average_precision"] if right else [])):
        entry = found[name]
        width = entry["high"] - entry["low"]
        assert entry["value"] in (entry["high" if right else "low"],), name
        assert width > 1 / rows, name
        assert width < 8 / np.sqrt(rows), name
        assert width < 16 / rows or rows < 40, name


def test_the_interval_of_f1_is_that_of_the_rows_it_is_about():
    labels, groups = np.array([0, 0, 0, 0, 1, 1]), np.arange(6)
    found = metric_intervals(
        Measure(labels, labels * 0.8 + 0.1, 0.5), compute_metrics(labels, labels * 0.8 + 0.1), groups, resamples=50
    )
    low, _ = wilson(2, 2)
    assert (found["f1_1"]["low"], found["f1_1"]["high"]) == (pytest.approx(2 * low / (1 + low)), 1.0)
    low, _ = wilson(4, 4)
    assert found["f1_0"]["low"] == pytest.approx(2 * low / (1 + low))
    gaps = [(1 - wilson(number, number)[0]) / 2 for number in (2, 4)]
    assert found["balanced_accuracy"]["low"] == pytest.approx(1 - np.hypot(*gaps))


def test_one_class_all_right_has_a_balanced_accuracy_with_a_width():
    labels, probabilities = np.ones(8, dtype=np.int64), np.full(8, 0.9)
    values = compute_metrics(labels, probabilities)
    found = metric_intervals(Measure(labels, probabilities, 0.5), values, np.arange(8), resamples=50)
    assert found["balanced_accuracy"] == found["recall_1"]


def test_a_class_that_is_never_answered_has_no_interval_of_precision():
    labels, probabilities = np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3])
    found = metric_intervals(
        Measure(labels, probabilities, 0.5), compute_metrics(labels, probabilities), np.arange(3), resamples=50
    )
    assert found["precision_1"] == {"value": 0.0, "low": None, "high": None}
    assert (found["recall_1"]["low"], found["recall_1"]["high"]) == wilson(0, 2)


def test_resamples_without_a_value_are_left_out():
    assert bounds(np.array([np.nan, 0.0, 1.0])) == pytest.approx((0.025, 0.975))
    assert np.isnan(bounds(np.array([np.nan]))).all()


def coverage(grouped, times, resamples, shared):
    """Return how often the interval of accuracy holds the true accuracy, where rows of a picture are alike."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(times):
        difficulty = np.repeat(rng.normal(size=60), 4) if shared else rng.normal(size=240)
        right = 0.9 * difficulty + np.sqrt(1 - 0.81) * rng.normal(size=240) > -0.6745  # accuracy 0.75
        groups = np.repeat(np.arange(60), 4) if grouped else np.arange(240)
        (draws,) = bootstrap(
            [lambda weights, right=right: {"accuracy": weights @ right / weights.sum(axis=1)}],
            groups,
            resamples=resamples,
        )
        low, high = bounds(draws["accuracy"])
        held += low <= 0.75 <= high
    return held / times


def test_intervals_cover_where_rows_belong_together_and_only_if_resampled_so():
    assert 0.88 <= coverage(True, 200, 200, shared=True) <= 0.99
    assert coverage(False, 200, 200, shared=True) < 0.85


def test_intervals_cover_where_rows_are_independent():
    assert 0.89 <= coverage(False, 200, 200, shared=False) <= 0.99


@pytest.mark.soak
def test_intervals_cover_at_length():
    assert 0.92 <= coverage(True, 2_000, 1_000, shared=True) <= 0.97


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (7, 10), (10, 10), (450, 1000)])
def test_wilson_equals_scipy(right, rows):
    expected = binomtest(right, rows).proportion_ci(method="wilson")
    assert wilson(right, rows) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 80, 240, 10_001])
def test_the_share_itself_is_inside_its_interval_at_both_ends(rows):
    assert wilson(0, rows)[0] == 0.0
    assert wilson(rows, rows)[1] == 1.0
