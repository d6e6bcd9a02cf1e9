"""Rankings and the area under the ROC curve: scikit-learn's numbers, for many weightings at once."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from qwen_vl_classifier.classifier.ranking import Ranking, auroc

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=80).round(1)  # with ties
CLASSES = (RNG.random(80) < 0.4).astype(np.int64)
WEIGHTS = RNG.uniform(0, 2, 80) * (RNG.random(80) < 0.8)


def test_auroc_is_that_of_scikit_learn():
    assert auroc(SCORES, CLASSES, WEIGHTS) == pytest.approx(roc_auc_score(CLASSES, SCORES, sample_weight=WEIGHTS))


def test_auroc_of_one_class_is_not_a_number():
    assert np.isnan(auroc(SCORES, np.zeros(80, dtype=np.int64), WEIGHTS))
    assert np.isnan(auroc(SCORES, CLASSES, np.where(CLASSES == 1, WEIGHTS, 0.0)))


def test_counts_are_weights_at_or_above_each_score():
    ranking = Ranking(SCORES, CLASSES == 1)
    weightings = np.stack([WEIGHTS, np.ones(80)])
    hits, alarms = ranking.counts(weightings)
    for step, score in enumerate(ranking.scores):
        above = score <= SCORES
        np.testing.assert_allclose(hits[:, step], (weightings * above * (CLASSES == 1)).sum(axis=1))
        np.testing.assert_allclose(alarms[:, step], (weightings * above * (CLASSES == 0)).sum(axis=1), atol=1e-12)
    assert (np.diff(ranking.scores) < 0).all()
    np.testing.assert_array_equal(ranking.counts()[0], hits[1])
