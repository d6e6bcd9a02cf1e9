"""Cohen's kappa and its interval, by their definitions and by sklearn."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from qwen_vl_classifier.labelling.answers.agreement import agreement_of, cohen_kappa


def drawn(seed, rows=80, words=("yes", "no"), agree=0.7):
    """Return answers of two annotators who agree at least in a part of the rows."""
    rng = np.random.default_rng(seed)
    first = rng.choice(words, rows, p=[0.5, *[0.5 / (len(words) - 1)] * (len(words) - 1)])
    second = np.where(rng.random(rows) < agree, first, rng.choice(words, rows))
    return list(zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("words", [("yes", "no"), ("cat", "dog", "bird", "none")])
@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_that_of_sklearn(words, seed):
    pairs = drawn(seed, words=words)
    found = cohen_kappa(pairs)
    assert found.rows == 80
    assert found.value == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))


def kappa_of(table):
    expected = table.sum(axis=1) @ table.sum(axis=0)
    return (np.trace(table) - expected) / (1 - expected)


@pytest.mark.parametrize("words", [("yes", "no"), ("cat", "dog", "bird")])
def test_the_interval_is_that_of_the_delta_method(words):
    """The formula of Fleiss, Cohen and Everitt is the delta method for a multinomial table."""
    pairs = drawn(3, words=words, agree=0.5)
    table = np.zeros((len(words), len(words)))
    for first, second in pairs:
        table[words.index(first), words.index(second)] += 1 / len(pairs)
    slopes = np.empty_like(table)
    for place in np.ndindex(table.shape):
        step = np.zeros_like(table)
        step[place] = 1e-6
        slopes[place] = (kappa_of(table + step) - kappa_of(table - step)) / 2e-6
    variance = ((table * slopes**2).sum() - (table * slopes).sum() ** 2) / len(pairs)
    found = cohen_kappa(pairs)
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-4)
    assert (found.high + found.low) / 2 == pytest.approx(found.value)


def test_full_agreement_on_few_rows_says_little():
    few, many = (cohen_kappa([("yes", "yes"), ("no", "no")] * number) for number in (3, 300))
    assert (few.value, few.high) == (many.value, many.high) == (1, 1)
    assert few.low < 0.2 < 0.98 < many.low


@pytest.mark.parametrize("pairs", [[], [("yes", "yes")] * 5])
def test_without_two_answers_there_is_none(pairs):
    assert cohen_kappa(pairs) is None


def test_the_two_with_most_rows_in_common_are_described():
    answers = [{"ann": "yes", "bob": "yes"}, {"ann": "no", "bob": "no"}, {"ann": "no", "bob": "yes", "cy": "no"}]
    found = agreement_of(answers, ties=2)
    assert (found["rows"], found["annotators"], found["ties"]) == (3, ["ann", "bob"], 2)
    assert found["kappa"][0] == pytest.approx(cohen_kappa_score(["yes", "no", "no"], ["yes", "no", "yes"]))
    assert agreement_of([], ties=0) is None
