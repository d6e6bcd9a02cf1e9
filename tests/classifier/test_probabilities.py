"""Log loss and calibration error by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics

from qwen_vl_classifier.classifier.probabilities import (
    calibration_errors,
    expected_calibration_error,
    log_loss,
    margin_losses,
)


class TestMeasures:
    """Log loss and calibration error by their definitions."""

    def test_log_loss_is_scikit_learns(self):
        rng = np.random.default_rng(0)
        p, labels, weights = rng.random(50), rng.integers(0, 2, 50), rng.random(50)
        assert log_loss(p, labels) == pytest.approx(sklearn.metrics.log_loss(labels, p))
        wanted = sklearn.metrics.log_loss(labels, p, sample_weight=weights)
        assert log_loss(p, labels, weights=weights) == pytest.approx(wanted)

    def test_losses_of_margins_are_scikit_learns_and_of_soft_labels_means_over_labels(self):
        margins, labels = np.array([-3.0, 0.0, 0.5, 40.0]), np.array([1.0, 0.0, 1.0, 1.0])
        wanted = sklearn.metrics.log_loss(labels, 1 / (1 + np.exp(-margins)))
        assert margin_losses(margins, labels).mean() == pytest.approx(wanted)
        ones, zeros = (margin_losses(margins, np.full(4, label)) for label in (1.0, 0.0))
        np.testing.assert_allclose(margin_losses(margins, np.full(4, 0.3)), 0.3 * ones + 0.7 * zeros)

    def test_certain_and_wrong_is_finite(self):
        assert 30 < log_loss(np.array([0.0]), np.array([1])) < 40

    def test_soft_targets(self):
        assert log_loss(np.array([0.3]), np.array([0.3])) == pytest.approx(-(0.3 * np.log(0.3) + 0.7 * np.log(0.7)))

    def test_calibration_error_of_bins_with_equally_many_rows(self):
        p = np.random.default_rng(0).random(100) ** 3
        labels = np.random.default_rng(1).integers(0, 2, 100)
        parts = np.array_split(np.argsort(p), 10)
        wanted = sum(abs(p[part].mean() - labels[part].mean()) * len(part) / 100 for part in parts)
        assert expected_calibration_error(p, labels) == pytest.approx(wanted)

    def test_equal_probabilities_are_in_one_bin(self):
        labels = np.arange(40) % 2
        assert expected_calibration_error(np.full(40, 0.5), labels) == pytest.approx(0)
        assert expected_calibration_error(np.full(40, 0.8), labels) == pytest.approx(0.3)

    def test_weights(self):
        rng = np.random.default_rng(0)
        p, labels = np.repeat([0.2, 0.6, 0.9], 10), rng.integers(0, 2, 30)
        weights = rng.integers(1, 4, 30)
        wanted = sum(abs((weights * (p - labels))[p == value].sum()) / weights.sum() for value in (0.2, 0.6, 0.9))
        assert expected_calibration_error(p, labels, weights=weights.astype(float)) == pytest.approx(wanted)

    def test_without_what_chance_adds(self):
        """Of perfect probabilities and few rows the plain error is far above 0, the other near it."""
        rng = np.random.default_rng(0)
        plain, without = [], []
        for _ in range(50):
            p = rng.random(200)
            labels = (rng.random(200) < p).astype(int)
            plain.append(expected_calibration_error(p, labels))
            without.append(calibration_errors(p, labels)[0])
        assert np.mean(without) < 0.04 < 0.06 < np.mean(plain)
        p, labels = np.full(100_000, 0.8), (rng.random(100_000) < 0.6).astype(int)
        assert calibration_errors(p, labels)[0] == pytest.approx(0.2, abs=0.01)
