"""The estimate pays for the choice, and is as unsure as the rows are few."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from qwen_vl_classifier import Tap, TrainConfig
from qwen_vl_classifier.classifier.calibration import Calibration
from qwen_vl_classifier.training.probe.estimate import held_out_estimate, search_estimate
from qwen_vl_classifier.training.probe.search import search

pytestmark = pytest.mark.usefixtures("one_thread")


def estimate(margins: np.ndarray, targets: np.ndarray, **options) -> dict:
    """Estimate for the candidate with the least log loss, with a temperature or with the calibration given."""
    rows = len(targets)
    defaults = {"objective": "accuracy", "seed": 0, "samples": 200}
    chosen = int((np.logaddexp(0, margins) - targets[:, None] * margins).sum(axis=0).argmin())
    calibration, groups = options.pop("calibration", Calibration(1.1)), options.pop("groups", np.arange(rows))
    return search_estimate(margins, chosen, calibration, 0.5, targets, np.ones(rows), groups, **(defaults | options))


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
    assert estimate(np.zeros((29, 1)) + 1.0, (np.arange(29) % 2).astype(float))["few"]
    assert not estimate(np.zeros((30, 1)) + 1.0, (np.arange(30) % 2).astype(float))["few"]


@pytest.mark.parametrize("rows", [6, 20, 200])
@pytest.mark.parametrize("calibration", [Calibration(), Calibration(2.0)])
def test_rows_that_are_all_right_are_no_proof_of_perfection(rows, calibration):
    targets = (np.arange(rows) % 2).astype(float)
    margins = np.where(targets[:, None] == 1, 6.0, -6.0) + np.random.default_rng(0).normal(size=(rows, 3))
    found = estimate(margins, targets, calibration=calibration)
    held = held_out_estimate(1 / (1 + np.exp(-margins[:, 0])), 0.5, targets, np.ones(rows), np.arange(rows), seed=0)
    for one in (found, held):
        assert one["accuracy"]["mean"] == one["accuracy"]["high"] == one["auroc"]["mean"] == one["auroc"]["high"] == 1
        assert one["accuracy"]["low"] < 1 - 2 / (rows + 4)
        assert one["auroc"]["low"] < 1 - 1 / rows
        # A twentieth of wrong answers, each of which costs six, is not excluded by a few rows.
        assert one["log_loss"]["high"] > one["log_loss"]["mean"] + 6 / (rows + 4)
        assert one["ece"]["high"] > 2 / (rows + 4)


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_never_excludes_its_own_estimate(seed):
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(6, 40))
    targets = rng.permutation(np.arange(rows) % 2).astype(float)
    margins = (targets[:, None] - 0.5) * rng.uniform(0, 8) + rng.normal(size=(rows, 50))
    groups = np.arange(rows) // int(rng.integers(1, 4))
    held = held_out_estimate(1 / (1 + np.exp(-margins[:, 0])), 0.5, targets, np.ones(rows), groups, seed=seed)
    for found in (estimate(margins, targets, groups=groups, seed=seed), held):
        for name in ("accuracy", "log_loss", "auroc", "ece"):
            value = found[name]
            assert value["low"] <= value["mean"] <= value["high"], name
            assert value["high"] > value["low"], name


def test_the_intervals_hold_what_new_rows_say():
    """Twenty rows and thirty candidates that differ in how good they are, again and again."""
    rng = np.random.default_rng(0)
    held = {name: [] for name in ("accuracy", "log_loss", "auroc")}
    skill = np.linspace(0.5, 1.5, 30)
    for _ in range(40):
        targets, new = (rng.permutation(np.arange(count) % 2).astype(float) for count in (20, 4000))
        margins, fresh = (
            4 * (rows - 0.5)[:, None] * skill + 2 * rng.normal(size=(len(rows), 30)) for rows in (targets, new)
        )
        found = estimate(margins, targets, calibration=Calibration(), samples=40)
        chosen = fresh[:, (np.logaddexp(0, margins) - targets[:, None] * margins).sum(axis=0).argmin()]
        truth = {
            "accuracy": np.mean((chosen >= 0) == new),
            "log_loss": np.mean(np.logaddexp(0, chosen) - new * chosen),
            "auroc": roc_auc_score(new, chosen),
        }
        for name, value in truth.items():
            held[name].append(found[name]["low"] <= value <= found[name]["high"])
    assert all(np.mean(values) >= 0.93 for values in held.values()), held


def test_groups_that_cannot_be_drawn_apart_say_nothing():
    found = estimate(np.array([[1.0], [-1.0]]), np.array([1.0, 0.0]), groups=np.array([0, 0]))
    assert found["samples"] == 0
    assert found["accuracy"] == {"mean": None, "low": None, "high": None}


def test_rows_of_a_group_are_drawn_together():
    targets = np.repeat([0.0, 1.0] * 10, 50)
    margins = np.repeat(np.random.default_rng(0).normal(size=20) + [-1, 1] * 10, 50)[:, None]
    groups = np.repeat(np.arange(20), 50)
    apart = estimate(margins, targets)
    together = estimate(margins, targets, groups=groups)
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
