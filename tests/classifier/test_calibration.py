"""Calibration against torch's softmax and a search by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwen_vl_classifier.classifier.calibration import fit_temperature, probabilities


def log_losses(logits: np.ndarray, labels: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """The log loss against Platt's targets at each of some temperatures, by torch."""
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    target = torch.from_numpy(np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2)))
    scaled = torch.from_numpy(logits).double() / torch.from_numpy(temperatures).double()[:, None, None]
    rows = scaled.log_softmax(dim=-1)
    return -(target * rows[..., 1] + (1 - target) * rows[..., 0]).mean(dim=1).numpy()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1.7, 20.0])
def test_probabilities_are_torchs_softmax(temperature):
    logits = np.random.default_rng(0).normal(scale=5, size=(200, 2)).astype(np.float32)
    wanted = (torch.from_numpy(logits).double() / temperature).softmax(dim=-1).numpy()
    seen = probabilities(logits, temperature)
    assert seen.dtype == np.float64
    np.testing.assert_allclose(seen, wanted, rtol=1e-12, atol=1e-300)


@given(
    logits=arrays.arrays(np.float32, (3, 2), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    temperature=st.floats(1e-6, 1e6),
)
def test_any_finite_logits_give_probabilities(logits, temperature):
    seen = probabilities(logits, temperature)
    assert np.isfinite(seen).all()
    assert ((seen >= 0) & (seen <= 1)).all()
    np.testing.assert_allclose(seen.sum(axis=1), 1, rtol=1e-12)
    higher = logits[:, 1] > logits[:, 0]
    assert (seen[higher, 1] >= 0.5).all()
    assert (seen[~higher, 1] <= 0.5).all()


def test_no_logits():
    assert probabilities(np.zeros((0, 2), dtype=np.float32)).shape == (0, 2)


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_fine_grid(true_temperature):
    rng = np.random.default_rng(1)
    margin = rng.normal(scale=2, size=3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(-margin))).astype(np.int64)
    logits = np.stack([np.zeros(3000), margin], axis=1) * true_temperature
    grid = np.geomspace(0.05, 20, 601)
    losses = log_losses(logits, labels, grid)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(grid[losses.argmin()], rel=0.02)
    assert found == pytest.approx(true_temperature, rel=0.15)
    assert log_losses(logits, labels, np.array([found]))[0] <= losses.min() + 1e-9


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[0, 1], [1, 0]], [1, 0]),  # all right: nothing but the bound stops certainty
        ([[0, 1], [1, 0]], [0, 1]),  # all wrong
        ([[0, 0], [0, 0]], [0, 1]),
        ([[-3e38, 3e38], [3e38, -3e38], [0, 1]], [1, 0, 0]),
        ([[-3e38, 3e38]], [0]),
    ],
)
def test_extreme_logits_give_a_temperature_within_bounds(logits, labels):
    found = fit_temperature(np.array(logits, dtype=np.float32), np.array(labels))
    assert 0.05 <= found <= 20


@pytest.mark.parametrize(("rows", "most"), [(4, 0.76), (12, 0.88), (100, 0.985)])
def test_a_few_rows_that_are_all_right_are_no_proof_of_certainty(rows, most):
    labels = np.arange(rows) % 2
    logits = np.stack([np.zeros(rows), np.where(labels, 15.0, -15.0)], axis=1)
    probability = probabilities(logits, fit_temperature(logits, labels))
    assert 0.7 < probability.max(axis=1).min() <= probability.max() < most


def test_calibration_keeps_the_order():
    logits = np.random.default_rng(2).normal(size=(50, 2))
    order = np.argsort(logits[:, 1] - logits[:, 0])
    for temperature in (0.1, 9.0):
        assert (np.diff(probabilities(logits, temperature)[order, 1]) >= 0).all()
