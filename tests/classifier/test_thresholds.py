"""Thresholds against a search by brute force, and against what calibrated probabilities are known to want."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.errors import ConfigError, TrainingError
from qwen_vl_classifier.objectives import Objective

# Few distinct values, so that ties occur, with both ends of the range and two neighbouring numbers.
VALUES = (0.0, 0.1, 0.25, 0.5, 0.6, float(np.nextafter(0.6, 1)), 0.9, 1.0)
ROWS = st.lists(st.tuples(st.sampled_from(VALUES), st.integers(0, 1)), min_size=1, max_size=12)


def arrays(rows: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p for p, _ in rows]), np.array([label for _, label in rows])


def every_cut(p: np.ndarray) -> np.ndarray:
    """Thresholds that give every set of answers that a threshold can give."""
    return np.array([*np.unique(p), *([np.nextafter(p.max(), 1)] if p.max() < 1 else [])])


def sample(rows: int, *, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels; without shift the probabilities are true."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(scale=2, size=rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    return 1 / (1 + np.exp(-log_odds - shift)), labels


class TestCost:
    """accuracy, balanced and cost are one family."""

    @pytest.mark.parametrize(
        ("objective", "wanted"), [("accuracy", 0.5), ("cost=1:1", 0.5), ("cost=4:1", 0.2), ("cost=1:9", 0.9)]
    )
    @pytest.mark.parametrize("rows", [1, 5000])
    def test_calibrated_probabilities_get_the_bayes_threshold(self, objective, wanted, rows):
        assert choose_threshold(*sample(rows), objective) == pytest.approx(wanted)

    def test_balanced_is_the_share_of_class_1(self):
        p, labels = sample(5000, seed=1)
        kept = (labels == 0) | (np.random.default_rng(0).random(5000) < 0.2)
        odds = p / (1 - p) * 0.2  # true for the rows that are left
        p, labels = (odds / (1 + odds))[kept], labels[kept]
        assert labels.mean() < 0.25
        assert choose_threshold(p, labels, "balanced") == pytest.approx(labels.mean())

    @pytest.mark.parametrize(("objective", "miss", "alarm"), [("accuracy", 1, 1), ("cost=5:1", 5, 1)])
    def test_probabilities_that_are_off_get_the_cheapest_threshold(self, objective, miss, alarm):
        p, labels = sample(2000, shift=3.0)
        found = choose_threshold(p, labels, objective)

        def cost(threshold: float) -> float:
            return float(np.where(labels == 1, miss * (p < threshold), alarm * (p >= threshold)).mean())

        assert cost(found) == min(map(cost, every_cut(p)))
        assert cost(found) < cost(alarm / (alarm + miss)) - 0.02
        assert found == pytest.approx(1 / (1 + np.exp(-3) * miss / alarm), abs=0.05)

    @pytest.mark.parametrize(("objective", "bayes"), [("accuracy", 0.5), ("cost=4:1", 0.2)])
    @pytest.mark.parametrize("rows", [20, 300])
    def test_chance_does_not_throw_it_about(self, objective, bayes, rows):
        moved = [choose_threshold(*sample(rows, seed=seed), objective) != bayes for seed in range(100)]
        assert 0 < np.mean(moved) < 0.2

    def test_four_rows_of_one_mind_are_chance_and_five_are_not(self):
        for rows, wanted in ((4, 0.5), (5, 0.65)):
            p = np.array([0.1, 0.9, 0.7, *[0.6] * rows])
            labels = np.array([0, 1, 1, *[0] * rows])
            assert choose_threshold(p, labels, "accuracy") == pytest.approx(wanted)

    def test_one_class_is_enough_for_accuracy(self):
        assert choose_threshold(np.array([0.4, 0.9]), np.array([1, 1]), "accuracy") == 0.5

    def test_always_and_never_are_among_the_candidates(self):
        p = np.linspace(0.3, 0.7, 50)
        assert choose_threshold(p, np.ones(50, dtype=int), "accuracy") == pytest.approx(0.15)
        assert choose_threshold(p, np.zeros(50, dtype=int), "accuracy") == pytest.approx(0.85)


class TestF1:
    """The best F1 there is."""

    @given(ROWS)
    def test_no_cut_has_a_higher_one(self, rows):
        p, labels = arrays(rows)
        assume(labels.any())
        found = choose_threshold(p, labels, "f1")
        best = max(f1_score(labels, p >= cut, zero_division=0) for cut in every_cut(p))
        assert f1_score(labels, p >= found, zero_division=0) == pytest.approx(best)

    def test_of_equals_the_one_nearest_to_half_of_it(self):
        # Above 0.55: 1 hit, 0 alarms, 2 misses. From 0.15 on: 3 hits, 6 alarms. F1 is 1/2 for both.
        p = np.array([0.9, *[0.2] * 6, 0.2, 0.2])
        labels = np.array([1, *[0] * 6, 1, 1])
        assert f1_score(labels, p >= 0.55) == f1_score(labels, p >= 0.1) == 0.5
        assert choose_threshold(p, labels, "f1") == pytest.approx(0.1)  # 0.25 is nearer to 0.1 than to 0.55

    def test_calibrated_probabilities_get_half_of_it(self):
        p, labels = sample(20000)
        found = choose_threshold(p, labels, "f1")
        assert found == pytest.approx(f1_score(labels, p >= found) / 2, abs=0.05)


class TestAtLeast:
    """A recall or a precision to reach."""

    @given(ROWS, st.sampled_from([0.1, 0.5, 0.75, 0.9, 1.0]))
    def test_recall_is_reached_by_the_highest_cut_that_does(self, rows, least):
        p, labels = arrays(rows)
        assume(labels.any())
        found = choose_threshold(p, labels, f"recall>={least}")
        assert recall_score(labels, p >= found) >= least
        higher = [cut for cut in every_cut(p) if (p >= cut).sum() < (p >= found).sum()]
        assert all(recall_score(labels, p >= cut) < least for cut in higher)

    @given(ROWS, st.sampled_from([0.1, 0.5, 0.75, 0.9, 1.0]))
    def test_precision_is_reached_by_the_lowest_cut_that_does(self, rows, least):
        p, labels = arrays(rows)
        assume(labels.any())
        cuts = [cut for cut in every_cut(p) if (p >= cut).any()]
        precisions = [precision_score(labels, p >= cut) for cut in cuts]
        if max(precisions) < least:
            with pytest.raises(
                TrainingError, match=f"the highest precision that can be reached is {max(precisions):.4g}"
            ) as no:
                choose_threshold(p, labels, f"precision>={least}")
            assert "\n" not in str(no.value)
            return
        found = choose_threshold(p, labels, f"precision>={least}")
        assert precision_score(labels, p >= found) >= least
        lower = [cut for cut in cuts if (p >= cut).sum() > (p >= found).sum()]
        assert all(precision_score(labels, p >= cut) < least for cut in lower)


@given(ROWS, st.sampled_from(["accuracy", "balanced", "cost=3:1", "f1", "recall>=0.8", "precision>=0.3"]))
def test_a_weight_of_two_is_a_row_twice(rows, objective):
    p, labels = arrays(rows)
    assume(labels.any() and not labels.all())
    twice = np.arange(len(p)) % 2 + 1
    goal = Objective.parse(objective)
    try:
        wanted = choose_threshold(np.repeat(p, twice), np.repeat(labels, twice), goal)
    except TrainingError:
        with pytest.raises(TrainingError):
            choose_threshold(p, labels, goal, weights=twice)
        return
    found = choose_threshold(p, labels, goal, weights=twice)
    assert 0 <= found <= 1
    if goal.kind in ("f1", "recall", "precision"):
        assert found == wanted


@pytest.mark.parametrize(
    ("objective", "label"), [("f1", 0), ("recall>=0.5", 0), ("precision>=0.5", 0), ("balanced", 1)]
)
def test_a_class_that_is_asked_about_must_occur(objective, label):
    with pytest.raises(TrainingError, match=f"none of 2 rows has label {1 - label}"):
        choose_threshold(np.array([0.2, 0.8]), np.array([label, label]), objective)


def test_words_that_are_no_objective():
    with pytest.raises(ConfigError, match="'best'"):
        choose_threshold(np.array([0.2, 0.8]), np.array([0, 1]), "best")
