"""Rows that were chosen because a model was unsure of them mislead an estimate; those drawn at random do not."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier import Example, Tap, TrainConfig
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.probe.fitting import FeatureRows, fit_rows
from qwen_vl_classifier.training.probe.random_rows import check_random_rows, random_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TAP = Tap(1, "mean")
CONFIG = TrainConfig(heads="linear", sampled_column="sampled")


def feature_rows(x: np.ndarray, targets: np.ndarray, measured: np.ndarray | None) -> FeatureRows:
    count = len(targets)
    features = x[:, None].astype(np.float32)
    return FeatureRows([TAP], features, targets, np.ones(count), np.arange(count), measured=measured)


def population(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of which the first tells the class, more or less clearly."""
    x = rng.normal(size=(count, 3))
    x[:, 0] *= 3
    return x, (rng.random(count) < 1 / (1 + np.exp(-1.5 * x[:, 0]))).astype(float)


def biased(seed: int, at_random: int, chosen: int) -> tuple[FeatureRows, float]:
    """Return rows drawn at random with hard ones beside them, and the accuracy that a perfect head has on new rows."""
    rng = np.random.default_rng(seed)
    x, targets = population(rng, 20_000)
    hard = np.argsort(np.abs(x[at_random:, 0]))[:chosen] + at_random
    rows = np.concatenate([np.arange(at_random), hard])
    truth = float(np.mean((x[:, 0] > 0) == targets))
    return feature_rows(x[rows], targets[rows], np.arange(len(rows)) < at_random), truth


def accuracy(rows: FeatureRows) -> dict[str, float]:
    estimate = fit_rows(rows, [TAP], CONFIG).estimate(rows, CONFIG)
    return {**estimate["accuracy"], "rows": estimate["rows"]}


def test_hard_rows_bias_an_estimate_and_random_ones_do_not():
    rows, truth = biased(0, at_random=120, chosen=240)
    on_random = accuracy(rows)
    on_all = accuracy(feature_rows(rows.features[:, 0], rows.targets, None))
    assert on_random["rows"] == 120
    assert on_all["rows"] == 360
    assert on_random["low"] <= truth <= on_random["high"]
    assert on_all["high"] < truth - 0.05


@pytest.mark.soak
def test_over_many_choices_the_estimate_is_unbiased_and_its_intervals_hold():
    errors, held, naive = [], [], []
    for seed in range(60):
        rows, truth = biased(seed, at_random=80, chosen=160)
        on_random = accuracy(rows)
        errors.append(on_random["mean"] - truth)
        held.append(on_random["low"] <= truth <= on_random["high"])
        naive.append(accuracy(feature_rows(rows.features[:, 0], rows.targets, None))["mean"] - truth)
    assert abs(np.mean(errors)) < 0.02
    assert np.mean(held) >= 0.93
    assert np.mean(naive) < -0.15


def test_a_row_is_random_where_the_column_says_so():
    words = ("random", "uncertain", None)
    examples = [Example(None, "a", fields={"how": word}) for word in words]
    found = random_rows(examples, "how")
    assert found is not None
    assert found.tolist() == [True, False, False]
    assert random_rows(examples, "") is None
    with pytest.raises(DataError, match=r"no row has a column 'sampled'.*'random'.*sampled_column"):
        random_rows(examples, "sampled")


@pytest.mark.parametrize(
    ("at_random", "targets"), [(9, np.arange(40) % 2), (30, np.arange(40) >= 30)], ids=["few rows", "one class"]
)
def test_too_few_random_rows_are_said_and_not_measured(at_random, targets):
    rows = feature_rows(np.zeros((40, 1)), targets.astype(float), np.arange(40) < at_random)
    checked, notes = check_random_rows(rows, CONFIG, validated=False)
    assert checked.measured is None
    assert f"{at_random} rows drawn at random" in notes[0]
    assert "may mislead" in notes[0]


def test_validation_rows_leave_the_column_without_effect():
    rows = feature_rows(np.zeros((40, 1)), (np.arange(40) % 2).astype(float), np.ones(40, dtype=bool))
    checked, notes = check_random_rows(rows, CONFIG, validated=True)
    assert checked.measured is None
    assert notes == ["sampled_column='sampled' has no effect with validation rows"]
