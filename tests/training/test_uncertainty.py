"""Intervals of few rows: never a point, and as wide as groups make them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, t
from sklearn.metrics import log_loss, roc_auc_score

from qwen_vl_classifier.training.uncertainty import effective_rows, row_scores, wilson

Z = 1.959963984540054


def scored(probability, targets, *, threshold=0.5, weights=None, groups=None):
    rows = len(targets)
    return row_scores(
        np.asarray(probability, dtype=float),
        threshold,
        np.asarray(targets, dtype=float),
        np.ones(rows) if weights is None else np.asarray(weights, dtype=float),
        np.arange(rows) if groups is None else np.asarray(groups),
    )


@pytest.mark.parametrize(("right", "rows"), [(0, 5), (5, 5), (1, 20), (19, 20), (300, 1000)])
def test_wilson_is_scipys(right, rows):
    wanted = binomtest(right, rows).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(right, rows), wanted, atol=1e-12)


class TestEffectiveRows:
    """How many independent rows say as much."""

    def test_independent_rows_count_each(self):
        values = (np.arange(1000) % 3 == 0).astype(float)
        found = effective_rows(values, np.ones(1000), np.arange(1000))
        assert found == pytest.approx(1000, rel=0.01)

    def test_rows_that_are_right_or_wrong_together_count_as_one(self):
        values = np.repeat((np.arange(200) % 3 == 0).astype(float), 5)
        groups = np.repeat(np.arange(200), 5)
        assert effective_rows(values, np.ones(1000), groups) == pytest.approx(200, rel=0.02)

    def test_where_nothing_varies_groups_count(self):
        groups = np.repeat(np.arange(40), 5)
        few = (Z / t.ppf(0.975, 39)) ** 2
        assert effective_rows(np.ones(200), np.ones(200), groups) == pytest.approx(40 * few)

    def test_one_group_is_one_row(self):
        assert effective_rows(np.array([1.0, 0.0]), np.ones(2), np.zeros(2, dtype=int)) == 1

    def test_a_heavy_row_is_not_many(self):
        weights = np.append(np.ones(50), 1000.0)
        assert effective_rows((np.arange(51) % 2).astype(float), weights, np.arange(51)) < 2


class TestRowScores:
    """What was measured, and how sure it is."""

    def test_the_values_are_scikit_learns(self):
        rng = np.random.default_rng(0)
        p, targets, weights = rng.random(80), rng.integers(0, 2, 80), rng.random(80) + 0.1
        found = scored(p, targets, threshold=0.3, weights=weights)
        assert found.log_loss == pytest.approx(log_loss(targets, p, sample_weight=weights))
        assert found.accuracy == pytest.approx(np.average((p >= 0.3) == targets, weights=weights))

    def test_soft_targets(self):
        found = scored([0.9, 0.2], [0.7, 0.4])
        wanted = -np.mean([0.7 * np.log(0.9) + 0.3 * np.log(0.1), 0.4 * np.log(0.2) + 0.6 * np.log(0.8)])
        assert found.log_loss == pytest.approx(wanted)

    def test_certain_answers_have_a_finite_loss(self):
        found = scored([0.0, 1.0, 1.0], [1, 0, 1])
        low, high = found.log_loss_interval()
        assert 0 <= low <= found.log_loss <= high < 100

    @pytest.mark.parametrize("rows", [6, 20, 100])
    def test_all_right(self, rows):
        targets = np.arange(rows) % 2
        found = scored(np.where(targets, 0.99, 0.01), targets)
        few = rows * (Z / t.ppf(0.975, rows - 1)) ** 2
        assert found.accuracy_interval() == pytest.approx(wilson(few, few))
        low, high = found.log_loss_interval()
        stake = np.log(99)
        assert low == pytest.approx(found.log_loss) == pytest.approx(-np.log(0.99))
        assert high == pytest.approx(found.log_loss + stake * (1 - wilson(few, few)[0]))
        assert found.overconfidence() == pytest.approx(0.99 - wilson(few, few)[0])
        low, high = found.auroc_interval(1.0, targets)
        assert high == 1
        assert low < 1 - 1 / rows

    def test_more_variance_makes_it_wider(self):
        rng = np.random.default_rng(0)
        targets = rng.integers(0, 2, 60)
        p = np.clip(targets * 0.4 + 0.3 + rng.normal(size=60) * 0.3, 0.01, 0.99)
        found, area = scored(p, targets), roc_auc_score(targets, p)
        for narrow, wide in (
            (found.accuracy_interval(), found.accuracy_interval(2.0)),
            (found.log_loss_interval(), found.log_loss_interval(2.0)),
            (found.auroc_interval(area, targets), found.auroc_interval(area, targets, 2.0)),
        ):
            assert wide[0] < narrow[0] < narrow[1] < wide[1]

    @pytest.mark.parametrize("area", [0.0, 0.5, 0.9, 1.0])
    def test_an_area_lies_in_its_interval(self, area):
        low, high = scored(np.full(30, 0.5), np.arange(30) % 2).auroc_interval(area, np.arange(30) % 2)
        assert 0 <= low <= area <= high <= 1
        assert 0.05 < high - low < 0.6

    def test_the_interval_of_an_area_holds_it(self):
        """Two normal distributions whose area is known, 25 rows each."""
        rng = np.random.default_rng(0)
        truth, held, targets = 0.9213503964748575, [], np.repeat([0, 1], 25)  # Phi(2 / sqrt(2))
        for _ in range(200):
            scores = rng.normal(size=50) + 2 * targets
            found = scored(1 / (1 + np.exp(-(scores - 1) * 2)), targets)
            low, high = found.auroc_interval(roc_auc_score(targets, scores), targets)
            held.append(low <= truth <= high)
        assert np.mean(held) >= 0.93

    def test_the_interval_of_a_log_loss_holds_it(self):
        """Answers that are right nine times in ten and say so, and those that claim more."""
        rng = np.random.default_rng(0)
        for claimed in (0.9, 0.99):
            truth, held = -(0.9 * np.log(claimed) + 0.1 * np.log(1 - claimed)), []
            for _ in range(200):
                targets, right = rng.integers(0, 2, 30), rng.random(30) < 0.9
                found = scored(np.where(right == targets, claimed, 1 - claimed), targets)
                low, high = found.log_loss_interval()
                held.append(low <= truth <= high)
            assert np.mean(held) >= 0.93
