"""Scores: scikit-learn's, and errors that know of groups."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from qwen_vl_classifier.training.probe.scores import auroc, mean_with_error, row_losses, score_row

RNG = np.random.default_rng(0)
MARGINS = RNG.normal(size=80).round(1)  # with ties
CLASSES = (RNG.random(80) < 0.4).astype(np.int64)
WEIGHTS = RNG.uniform(0, 2, 80) * (RNG.random(80) < 0.8)


def test_scores_are_those_of_scikit_learn():
    row = score_row(MARGINS, CLASSES.astype(float), WEIGHTS, np.arange(80))
    p = 1 / (1 + np.exp(-MARGINS))
    assert row["auroc"] == pytest.approx(roc_auc_score(CLASSES, MARGINS, sample_weight=WEIGHTS))
    assert row["log_loss"] == pytest.approx(log_loss(CLASSES, p, sample_weight=WEIGHTS))
    assert row["accuracy"] == pytest.approx(np.average((MARGINS >= 0) == CLASSES, weights=WEIGHTS))


def test_auroc_of_one_class_is_not_a_number():
    assert np.isnan(auroc(MARGINS, np.zeros(80, dtype=np.int64), WEIGHTS))
    assert np.isnan(auroc(MARGINS, CLASSES, np.where(CLASSES == 1, WEIGHTS, 0.0)))


def test_losses_of_soft_labels_are_means_over_labels():
    soft = row_losses(MARGINS, np.full(80, 0.3))
    np.testing.assert_allclose(soft, 0.3 * row_losses(MARGINS, np.ones(80)) + 0.7 * row_losses(MARGINS, np.zeros(80)))


def test_the_error_of_a_mean_is_that_of_independent_groups():
    values = RNG.normal(size=50)
    mean, error = mean_with_error(values, np.ones(50), np.arange(50))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    # The same rows twice tell nothing new if it is known that they are the same.
    twice = mean_with_error(np.repeat(values, 2), np.ones(100), np.repeat(np.arange(50), 2))
    assert twice == pytest.approx((mean, error))
