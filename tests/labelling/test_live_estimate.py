"""The live estimate: from rows drawn at random alone, with intervals that hold what comes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen_vl_classifier.classifier.ranking import auroc
from qwen_vl_classifier.labelling.choosing import Chooser
from qwen_vl_classifier.labelling.live_estimate import FEWEST_ROWS, live_estimate
from qwen_vl_classifier.labelling.live_head import fit_live_head
from tests.labelling.separable import separable

pytestmark = pytest.mark.usefixtures("one_thread")


def some_head(rows: int = 60, **options):
    pool, labels = separable(**options)
    return pool, fit_live_head(pool, np.arange(rows), labels[:rows])


def test_only_rows_drawn_at_random_have_a_say():
    pool, head = some_head()
    counted = np.arange(len(pool)) % 2 == 0
    estimate = live_estimate(head, counted, pool.groups)
    wrong = replace(head, out_of_fold=np.where(counted[head.rows], head.out_of_fold, -head.out_of_fold))
    assert live_estimate(wrong, counted, pool.groups) == estimate
    right = ((head.out_of_fold >= 0) == head.labels)[::2].mean()
    assert estimate.rows == 30
    assert estimate.accuracy[0] == right
    assert estimate.majority == max(head.labels[::2].mean(), 1 - head.labels[::2].mean())
    for value, low, high in (estimate.accuracy, estimate.auroc, estimate.log_loss, estimate.ece):
        assert low <= value <= high


def test_too_few_rows_or_one_class_give_no_figures():
    pool, head = some_head()
    none = np.zeros(len(pool), dtype=bool)
    assert live_estimate(head, none, pool.groups).majority is None
    for counted in (np.arange(len(pool)) < FEWEST_ROWS - 1, np.isin(np.arange(len(pool)), head.rows[head.labels == 1])):
        found = live_estimate(head, counted, pool.groups)
        assert found.rows == counted[:60].sum()
        assert found.accuracy is found.auroc is found.log_loss is found.ece is None


def test_rows_of_one_group_say_less():
    pool, head = some_head(100)
    counted = np.ones(len(pool), dtype=bool)
    order = np.argsort((head.out_of_fold >= 0) == head.labels)
    together = np.arange(len(pool))
    together[order] = np.arange(100) // 5
    (_, low, high), (_, wide_low, wide_high) = (
        live_estimate(head, counted, groups).accuracy for groups in (pool.groups, together)
    )
    assert wide_low < low
    assert wide_high > high


def coverage(runs: int, answers: int) -> np.ndarray:
    """Return how often the intervals of accuracy and AUROC hold the truth, over runs and numbers of labels."""
    holds = []
    for seed in range(runs):
        pool, labels = separable(1200, seed=seed, strength=0.9)
        chooser = Chooser(pool, seed=seed)
        rows: list[int] = []
        counts = {"random": 0, "uncertain": 0, "diverse": 0}
        passed, head = np.zeros(len(pool), dtype=bool), None
        while len(rows) < answers:
            for choice in chooser.choose(passed, counts, heads=[head], ahead=10):
                passed[choice.row] = True
                counts[choice.source] += 1
                rows.append(choice.row)
            head = fit_live_head(pool, rows, labels[rows], before=head)
            if len(rows) % 40 == 0:
                counted = chooser.random.counted(passed)
                estimate = live_estimate(head, counted, pool.groups)
                rest = ~passed
                accuracy = ((head.margins >= 0) == labels)[rest].mean()
                area = auroc(head.margins[rest], labels[rest], np.ones(rest.sum()))
                for truth, figure in ((accuracy, estimate.accuracy), (area, estimate.auroc)):
                    holds.append(figure[1] <= truth <= figure[2])
    return np.array(holds)


def test_intervals_hold_the_truth_in_a_few_runs():
    assert coverage(2, 80).mean() >= 0.9


@pytest.mark.soak
def test_intervals_hold_the_truth_in_many_runs():
    assert coverage(60, 240).mean() >= 0.9
