"""Which row to ask: an exact and unbiased random share, no row twice, and rows that teach."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.labelling.choosing import Chooser, RandomShare
from qwen_vl_classifier.labelling.live_head import fit_live_head
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from tests.labelling.separable import TAPS, made_up, separable

pytestmark = pytest.mark.usefixtures("one_thread")


def play(chooser: Chooser, rows: int, questions: int, *, start=None, heads=(), asked=()) -> list:
    """Ask one question after the other, as a session does that keeps nothing but what was asked."""
    passed, counts, choices = np.zeros(rows, dtype=bool), Counter(), list(asked)
    for choice in choices:
        passed[choice.row] = True
        counts[choice.source] += 1
    for _ in range(questions - len(choices)):
        choice = chooser.choose(passed, counts, heads=heads, start=start)[0]
        assert not passed[choice.row]
        passed[choice.row] = True
        counts[choice.source] += 1
        choices.append(choice)
    return choices


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 1 / 3, 0.9, 1])
def test_the_random_share_is_exact_in_any_run_of_questions(share):
    choices = play(Chooser(separable(90)[0], random_share=share), 90, 60)
    random = np.cumsum([choice.source == "random" for choice in choices])
    asked = np.arange(1, len(choices) + 1)
    assert (random >= share * asked - 1e-6).all()
    assert (random < share * asked + 1).all()


def test_other_sources_do_not_disturb_the_random_share():
    chooser = Chooser(separable(90)[0])
    passed = np.zeros(90, dtype=bool)
    counts = {"random": 1, "uncertain": 1, "diverse": 1}
    few, many = (chooser.choose(passed, {**counts, **more}, ahead=8) for more in ({}, {"check": 30, "queued": 50}))
    assert few == many


def test_a_session_that_was_killed_goes_on_with_the_same_rows():
    pool, _ = separable(80)
    whole = play(Chooser(pool, seed=4), 80, 40)
    assert play(Chooser(pool, seed=4), 80, 40, asked=whole[:17]) == whole
    assert [choice.row for choice in play(Chooser(pool, seed=5), 80, 40)] != [choice.row for choice in whole]


def test_all_rows_are_asked_once_and_then_none():
    pool, labels = separable(40, per_group=2)
    head = fit_live_head(pool, np.arange(20), labels[:20])
    chooser = Chooser(pool)
    choices = play(chooser, 40, 40, heads=[head, None])
    assert sorted(choice.row for choice in choices) == [*range(40)]
    assert chooser.choose(np.ones(40, dtype=bool), {}) == []


def test_what_follows_is_what_would_be_asked_next():
    pool, labels = separable(100)
    head = fit_live_head(pool, np.arange(30), labels[:30])
    passed = np.arange(100) < 30
    counts = Counter(random=8, uncertain=22)
    chooser = Chooser(pool)
    ahead = chooser.choose(passed, counts, heads=[head], ahead=9)
    assert len({choice.row for choice in ahead}) == 9
    for number, choice in enumerate(ahead):
        known = [one.row for one in ahead[:number]]
        assert chooser.choose(passed, counts, heads=[head], reserved=known) == [choice]
        counts[choice.source] += 1


def test_rows_of_new_groups_come_first():
    pool, _ = separable(60, per_group=3)
    choices = play(Chooser(pool, random_share=0), 60, 25)
    first = pool.groups[[choice.row for choice in choices[:20]]]
    assert len({*first.tolist()}) == 20


def test_the_active_ones_are_called_diverse_before_there_is_a_head_and_uncertain_after():
    pool, labels = separable(60)
    head = fit_live_head(pool, np.arange(20), labels[:20])
    for heads, source in (((), "diverse"), ((None,), "diverse"), ((head,), "uncertain")):
        found = {choice.source for choice in play(Chooser(pool), 60, 20, heads=heads)}
        assert found == {"random", source}


def test_what_the_head_is_sure_of_is_not_asked():
    pool, labels = separable(400, strength=3)
    head = fit_live_head(pool, np.arange(100), labels[:100])
    chooser = Chooser(pool, random_share=0)
    chosen = chooser.choose(np.arange(400) < 100, {}, heads=[head], ahead=10)
    unsure = np.abs(head.margins[[choice.row for choice in chosen]])
    assert np.median(unsure) < np.median(np.abs(head.margins[100:]))


def test_copies_of_a_row_are_not_asked_one_after_the_other():
    features, _ = made_up(60)
    features[30:] = features[0]
    copies = PoolFeatures(features, TAPS, np.arange(60))
    chosen = [choice.row for choice in play(Chooser(copies, random_share=0), 60, 12)]
    assert sum(row == 0 or row >= 30 for row in chosen) <= 4


def test_a_rare_class_is_searched_for():
    pool, labels = separable(1000, positives=0.03, strength=4)
    ones, zeros = np.flatnonzero(labels), np.flatnonzero(labels == 0)
    known = np.concatenate([ones[:2], zeros[:30]])
    head = fit_live_head(pool, known, labels[known])
    passed = np.isin(np.arange(1000), known)
    chosen = Chooser(pool, random_share=0).choose(passed, {}, heads=[head], ahead=5)
    assert labels[[choice.row for choice in chosen]].mean() > 0.3  # 0.03 of them at random


def test_both_ends_of_the_margins_to_start_from_come_before_there_is_a_head():
    pool, labels = separable(300, positives=0.2, strength=0)
    start = labels + np.random.default_rng(0).normal(size=300) * 0.2
    chosen = play(Chooser(pool, random_share=0), 300, 6, start=start)
    assert labels[[choice.row for choice in chosen]].sum() == 3


@given(st.integers(1, 30), st.data())
def test_rows_count_as_random_up_to_the_first_that_was_not_asked(rows, data):
    order = np.array(data.draw(st.permutations(range(rows))))
    passed = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    share = RandomShare(order)
    first = share.next(passed)
    counted = share.counted(passed)
    assert (first is None) == passed.all()
    assert passed[counted].all()
    before = order[: rows if first is None else order.tolist().index(first)]
    assert sorted(before) == np.flatnonzero(counted).tolist()


def test_rows_that_count_as_random_are_no_different_from_others_whatever_active_choice_does():
    rng, rows = np.random.default_rng(0), 60
    positive = np.arange(rows) < 15
    shares = []
    for _ in range(2000):
        share = RandomShare(rng.permutation(rows))
        passed = np.zeros(rows, dtype=bool)
        passed[rng.permutation(15)[:9]] = True  # active choice finds 9 of the 15 positives and nothing else
        for _ in range(12):
            passed[share.next(passed)] = True
        shares.append(positive[share.counted(passed)].mean())
    error = np.std(shares) / len(shares) ** 0.5
    assert abs(np.mean(shares) - 0.25) < 4 * error
    assert error < 0.004
