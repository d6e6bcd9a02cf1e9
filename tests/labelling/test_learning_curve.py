"""The learning curve: what it says early, in the middle, and when it is time to stop."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier.labelling.learning_curve import ENOUGH, LearningCurve, learning_curve
from qwen_vl_classifier.labelling.live_head import fit_live_head
from tests.labelling.separable import separable

pytestmark = pytest.mark.usefixtures("one_thread")


def curve_after(known: int, *, start=None, counted=None, **options: float) -> LearningCurve:
    pool, labels = separable(1000, **options)
    head = fit_live_head(pool, np.arange(known), labels[:known], start=start)
    return learning_curve(pool, head, np.ones(1000, dtype=bool) if counted is None else counted, start=start)


def test_with_few_labels_it_says_how_many_are_missing():
    few = curve_after(30)
    assert few == LearningCurve("Not enough labels to tell: give about 10 more.")
    none_random = curve_after(60, counted=np.zeros(1000, dtype=bool))
    assert none_random.sentence.startswith("Not enough labels to tell")
    rare = curve_after(60, positives=0.05, seed=3)
    assert rare.sentence.startswith("Not enough labels to tell")


def test_a_head_that_knows_nothing_never_says_stop():
    curve = curve_after(200, strength=0)
    assert curve.sentence.startswith("Not yet shown to be better than always giving the more frequent answer")
    assert curve.points
    assert not curve.stop
    assert curve.level is curve.gain_of_next_50 is None


def test_it_tells_what_more_labels_would_add():
    curve = curve_after(150, strength=1.6, width=40)
    assert [labels for labels, *_ in curve.points] == sorted({labels for labels, *_ in curve.points})
    assert all(low <= value <= high for _, value, low, high in curve.points)
    for value, low, high in (curve.level, curve.gain_of_next_50, curve.left):
        assert 0 <= low <= value <= high <= 1
    assert curve.left[2] > ENOUGH
    assert not curve.stop
    assert curve.sentence.startswith("50 more labels would add about")
    assert curve.fit[0][0] == pytest.approx(curve.points[0][0], abs=1)
    assert curve.fit[-1][0] == pytest.approx(225)
    values = [value for _, value in curve.fit]
    assert values == sorted(values)


def test_it_says_stop_where_nothing_is_left_to_gain():
    curve = curve_after(600, strength=8)
    assert curve.stop
    assert curve.sentence.startswith("Within half a point of where it will level off: you can stop.")


def test_margins_to_start_from_have_a_curve_too():
    _, labels = separable(1000, strength=0)
    start = 3.0 * labels + np.random.default_rng(0).normal(size=1000)
    curve = curve_after(80, strength=0, start=start)
    assert curve.points[-1][1] > 0.85


def test_the_same_labels_give_the_same_curve():
    assert curve_after(60) == curve_after(60)


@pytest.mark.soak
def test_the_accuracy_that_is_left_to_gain_is_mostly_held():
    holds = []
    for seed in range(20):
        pool, labels = separable(4000, seed=seed, strength=1.4, width=40)
        accuracies = [
            ((fit_live_head(pool, np.arange(known), labels[:known]).margins >= 0) == labels)[2000:].mean()
            for known in (200, 2000)
        ]
        curve = learning_curve(pool, fit_live_head(pool, np.arange(200), labels[:200]), np.ones(4000, dtype=bool))
        holds.append(curve.level[1] - 0.01 <= accuracies[1] <= curve.level[2] + 0.01)
    assert np.mean(holds) >= 0.8
