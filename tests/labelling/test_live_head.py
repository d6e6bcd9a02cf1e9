"""The live head: from two labels of each class on, chosen by what it says to rows that it was not trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.labelling.live_head import fit_live_head, label_folds
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from tests.labelling.separable import TAPS, made_up, separable

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_class_makes_no_head():
    pool, labels = separable()
    rows = np.flatnonzero(labels)[:5]
    assert fit_live_head(pool, rows, labels[rows]) is None
    assert fit_live_head(pool, [], []) is None


def test_two_labels_of_each_class_make_a_head():
    pool, labels = separable(strength=6)
    rows = np.concatenate([np.flatnonzero(labels == one)[:2] for one in (0, 1)])
    head = fit_live_head(pool, rows, labels[rows])
    assert head.folds == 2
    assert np.isfinite(head.margins).all()
    assert head.margins.shape == (len(pool),)
    assert head.out_of_fold.all()
    assert head.rows.tolist() == rows.tolist()


@pytest.mark.parametrize("positives", [[0], [0, 1]], ids=["one", "two of one group"])
def test_without_folds_there_is_a_head_that_claims_nothing_of_itself(positives):
    pool, _ = separable(per_group=2)
    rows = np.array([*positives, 5, 9])
    head = fit_live_head(pool, rows, (rows < 2).astype(int))
    assert head.folds == 0
    assert not head.out_of_fold.any()
    assert (head.margins[positives] > head.margins[[5, 9]].max()).all()


def test_it_finds_the_tap_and_answers_rows_without_labels():
    pool, labels = separable()
    rows = np.arange(120)
    head = fit_live_head(pool, rows, labels[rows])
    assert (head.tap, head.kind, head.start_weight) == (TAPS[1], "linear", 0)
    assert ((head.margins >= 0) == labels)[120:].mean() > 0.85
    assert ((head.out_of_fold >= 0) == labels[:120]).mean() > 0.85


def test_out_of_fold_answers_know_nothing_of_their_own_labels():
    pool, labels = separable(strength=0)
    rows = np.arange(100)
    head = fit_live_head(pool, rows, labels[rows])
    assert ((head.out_of_fold >= 0) == labels[:100]).mean() < 0.65  # whatever was best of all that was tried


def test_the_tap_stays_until_labels_have_grown_by_half():
    pool, labels = separable()
    first = fit_live_head(pool, np.arange(40), labels[:40])
    wrong = fit_live_head(pool, np.arange(40), np.roll(labels[:40], 1))
    assert fit_live_head(pool, np.arange(59), labels[:59], before=first).searched == 40
    again = fit_live_head(pool, np.arange(60), labels[:60], before=wrong)
    assert (again.searched, again.tap) == (60, TAPS[1])


def test_margins_to_start_from_are_used_where_they_help():
    pool, labels = separable(strength=0)
    start = 4.0 * labels + np.random.default_rng(1).normal(size=len(labels)) + 10
    rows = np.arange(20)
    head = fit_live_head(pool, rows, labels[rows], start=start)
    assert head.kind in ("start", "joined")
    assert head.start_weight > 0
    assert ((head.margins >= 0) == labels)[20:].mean() > 0.9
    useless = fit_live_head(*learnable(), start=start[::-1])
    assert useless.kind != "start"


def learnable() -> tuple:
    pool, labels = separable(strength=3)
    return pool, np.arange(60), labels[:60]


@pytest.mark.parametrize("kind", ["linear", "start", "joined"])
def test_new_rows_are_answered_as_those_of_the_pool(kind):
    features, labels = made_up(strength=0 if kind == "start" else 2)
    noise = np.random.default_rng(1).normal(size=len(labels))
    start = {"linear": None, "start": 1.5 * labels + noise, "joined": 2.0 * labels + noise}[kind]
    known = 60 if kind == "start" else 80
    head = fit_live_head(PoolFeatures(features, TAPS, np.arange(300)), np.arange(known), labels[:known], start=start)
    assert head.kind == kind
    assert head.margins_of(features[:, TAPS.index(head.tap)], start) == pytest.approx(head.margins, abs=1e-3)


def test_the_same_labels_give_the_same_head():
    pool, labels = separable(per_group=2)
    first, second = (fit_live_head(pool, np.arange(50), labels[:50], seed=3) for _ in range(2))
    assert (first.margins == second.margins).all()
    assert (first.out_of_fold == second.out_of_fold).all()


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=40), st.integers(2, 10))
def test_folds_are_whole_in_groups_and_hold_every_row_out_once(rows, count):
    labels, groups = (np.array(values) for values in zip(*rows, strict=True))
    parts = label_folds(labels, groups, count, 0)
    if not parts:
        assert min(len({*groups[labels == one]}) for one in (0, 1)) < 2
        return
    assert sorted(np.concatenate([held for _, held in parts])) == [*range(len(rows))]
    assert 2 <= len(parts) <= count
    for trained, held in parts:
        assert not {*groups[trained]} & {*groups[held]}
        assert {*labels[trained]} == {0, 1}


def test_folds_have_about_equally_many_rows_of_each_class():
    labels = (np.arange(100) % 10 == 0).astype(int)
    for _, held in label_folds(labels, np.arange(100), 5, 0):
        assert (len(held), labels[held].sum()) == (20, 2)
