"""The estimate pays for the choice, and is as unsure as the rows are few."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier import Tap, TrainConfig
from qwen_vl_classifier.training.estimate import held_out_estimate, search_estimate
from qwen_vl_classifier.training.search import search

pytestmark = pytest.mark.usefixtures("one_thread")


def estimate(margins: np.ndarray, targets: np.ndarray, **options) -> dict:
    rows = len(targets)
    defaults = {"objective": "accuracy", "isotonic": False, "seed": 0, "samples": 200}
    return search_estimate(margins, targets, np.ones(rows), np.arange(rows), **(defaults | options))


def test_of_noise_the_best_candidate_looks_good_and_the_estimate_does_not():
    """Averaged over data sets, each of pure noise with many taps."""
    rng = np.random.default_rng(0)
    taps = [Tap(layer, "mean") for layer in range(1, 21)]
    best, honest = [], []
    for seed in range(16):
        x = rng.normal(size=(60, len(taps), 4)).astype(np.float32)
        targets = rng.permutation(np.arange(60) % 2).astype(float)
        found = search(x, targets, np.arange(60), taps, TrainConfig(heads="linear", seed=seed))
        best.append(found.table[0]["accuracy"])
        margins = np.stack([candidate.margins for candidate in found.candidates], axis=1)
        honest.append(estimate(margins, targets, samples=20)["accuracy"]["mean"])
    assert np.mean(best) > 0.56
    assert np.mean(honest) == pytest.approx(0.5, abs=0.05)  # three standard errors of 16 sets of 60 coins


def test_a_single_good_candidate_is_worth_what_it_reaches():
    rng = np.random.default_rng(0)
    targets = (np.arange(400) % 2).astype(float)
    margins = (targets * 4 - 2 + rng.normal(size=400) * 1.5)[:, None]
    found = estimate(margins, targets)
    accuracy = np.mean((margins[:, 0] > 0) == targets)
    assert found["accuracy"]["mean"] == pytest.approx(accuracy, abs=0.01)
    assert found["accuracy"]["low"] < accuracy < found["accuracy"]["high"]
    assert found["rows"] == found["groups"] == 400
    assert found["samples"] == 200
    assert found["majority_accuracy"] == 0.5


def test_few_rows_and_few_groups_are_less_sure():
    rng = np.random.default_rng(0)

    def width(rows: int, **options) -> float:
        targets = (np.arange(rows) % 2).astype(float)
        found = estimate((targets * 2 - 1 + rng.normal(size=rows))[:, None], targets, **options)
        return found["accuracy"]["high"] - found["accuracy"]["low"]

    assert width(20) > 0.3 > 0.12 > width(1000)


def test_rows_of_a_group_are_drawn_together():
    targets = np.repeat([0.0, 1.0] * 10, 50)
    margins = np.repeat(np.random.default_rng(0).normal(size=20) + [-1, 1] * 10, 50)[:, None]
    groups = np.repeat(np.arange(20), 50)
    apart = estimate(margins, targets)
    together = search_estimate(
        margins, targets, np.ones(1000), groups, objective="accuracy", isotonic=False, seed=0, samples=200
    )
    spread = [found["accuracy"]["high"] - found["accuracy"]["low"] for found in (apart, together)]
    assert spread[1] > 3 * spread[0]
    assert together["groups"] == 20


def test_an_objective_out_of_reach_in_some_draws_is_left_out():
    rng = np.random.default_rng(0)
    targets = (np.arange(40) % 2).astype(float)
    found = estimate((targets + rng.normal(size=40))[:, None], targets, objective="precision>=0.95")
    assert 0 < found["samples"] <= 200


def test_held_out_rows_are_measured_as_they_are():
    rng = np.random.default_rng(0)
    targets = (np.arange(300) % 2).astype(float)
    probability = np.clip(0.5 + (targets - 0.5) * 0.6 + rng.normal(size=300) * 0.3, 0.01, 0.99)
    found = held_out_estimate(probability, 0.4, targets, np.ones(300), np.arange(300), seed=0, samples=200)
    accuracy = np.mean((probability >= 0.4) == targets)
    assert found["accuracy"]["mean"] == pytest.approx(accuracy)
    assert found["accuracy"]["low"] < accuracy < found["accuracy"]["high"]
    error = np.sqrt(accuracy * (1 - accuracy) / 300)
    assert found["accuracy"]["high"] - found["accuracy"]["low"] == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert found["method"] == "held-out rows"
