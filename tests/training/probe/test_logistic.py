"""Logistic regression of many problems at once is scikit-learn's of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from qwen_vl_classifier.training.probe.logistic import fit_logistic

pytestmark = pytest.mark.usefixtures("one_thread")


def data(rows: int, features: int, *, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features that vary along few axes more than along others, as hidden states do, and labels."""
    rng = np.random.default_rng(0)
    axes = min(features, 60)
    x = rng.normal(size=(rows, axes)) * np.logspace(0, -2, axes) @ rng.normal(size=(axes, features))
    x += 0.05 * rng.normal(size=x.shape)
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    y = x[:, :8].sum(axis=1) / 3 + noise * rng.normal(size=rows) > 0
    return x, y.astype(np.float64)


def reference(x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: float) -> np.ndarray:
    """Return scikit-learn's probabilities."""
    model = LogisticRegression(C=1 / (penalty * weights.sum()), tol=1e-8, max_iter=10_000)
    return model.fit(x.astype(np.float64), y, sample_weight=weights).predict_proba(x)[:, 1]


def probability(margins: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-margins))


@pytest.mark.parametrize(
    ("rows", "features", "noise"),
    [(120, 10, 1.0), (200, 60, 0.0), (40, 100, 1.0), (40, 81, 0.0), (150, 520, 1.0)],
    ids=["plain", "separable", "wide", "wide and separable", "more features than axes"],
)
def test_it_is_that_of_scikit_learn(rows, features, noise):
    x, y = data(rows, features, noise=noise)
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 3, (6, rows)) * rng.uniform(0.5, 2, (6, rows))
    penalties = np.array([10.0, 1.0, 1e-2, 1e-3, 1e-4, 1e-1])
    fit = fit_logistic(torch.from_numpy(x), y, weights, penalties)
    for margins, weight, penalty in zip(fit.margins, weights, penalties, strict=True):
        np.testing.assert_allclose(probability(margins), reference(x, y, weight, penalty), atol=1e-4)
    # The margins are those of the coefficients.
    np.testing.assert_allclose(x @ fit.coefficients.T + fit.intercepts, fit.margins.T, atol=2e-3)


def test_in_float64_it_is_exact_at_the_minimum():
    x, y = data(80, 20)
    fit = fit_logistic(torch.from_numpy(x).double(), y, np.ones((1, 80)), np.array([0.01]), tolerance=1e-14)
    error = probability(fit.margins[0]) - y
    gradient = error @ x / 80 + 0.01 * fit.coefficients[0]
    assert np.abs([*gradient, error.mean()]).max() < 1e-7


def test_a_problem_is_solved_alike_among_others_and_alone():
    x, y = data(90, 30)
    weights = (np.arange(90) % 3 != np.arange(3)[:, None]).astype(float)
    penalties = np.array([1.0, 1e-3, 0.1])
    together = fit_logistic(torch.from_numpy(x), y, weights, penalties)
    for number in range(3):
        alone = fit_logistic(torch.from_numpy(x), y, weights[number : number + 1], penalties[number : number + 1])
        np.testing.assert_allclose(alone.margins[0], together.margins[number], atol=1e-3)
    again = fit_logistic(torch.from_numpy(x), y, weights, penalties)
    np.testing.assert_array_equal(again.margins, together.margins)


def test_soft_labels_and_weights_are_rows_that_often():
    x, _ = data(50, 8)
    rng = np.random.default_rng(2)
    tenths, times = rng.integers(0, 11, 50), rng.integers(1, 4, 50)
    soft = fit_logistic(
        torch.from_numpy(x).double(), tenths / 10, times[None].astype(float), np.array([0.1]), tolerance=1e-13
    )
    rows = np.repeat(np.arange(50), 10 * times)
    labels = np.concatenate(
        [np.repeat([1.0, 0.0], [ones * n, (10 - ones) * n]) for ones, n in zip(tenths, times, strict=True)]
    )
    hard = fit_logistic(
        torch.from_numpy(x[rows]).double(), labels, np.ones((1, len(rows))), np.array([0.1]), tolerance=1e-13
    )
    np.testing.assert_allclose(soft.coefficients, hard.coefficients, atol=1e-6)
    np.testing.assert_allclose(soft.intercepts, hard.intercepts, atol=1e-6)


def test_features_that_are_all_zero_leave_the_intercept():
    fit = fit_logistic(torch.zeros(4, 3), np.array([0, 0, 0, 1.0]), np.ones((1, 4)), np.array([1.0]))
    np.testing.assert_allclose(probability(fit.margins[0]), 0.25, atol=1e-6)
    assert not fit.coefficients.any()
