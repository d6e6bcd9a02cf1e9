"""The distribution of scores in a training record, and the population stability index against it."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaincc

from qwen_vl_classifier.classifier.score_distribution import (
    RECORDED,
    ScoreDistribution,
    distribution_record,
    index_by_chance,
    recorded_distribution,
    stability_index,
)

COUNTS = st.lists(st.integers(0, 10_000), min_size=2, max_size=10)
PAIRS = COUNTS.filter(any).flatmap(
    lambda first: st.tuples(
        st.just(first), st.lists(st.integers(0, 10_000), min_size=len(first), max_size=len(first)).filter(any)
    )
)


def of(scores: object, weights: object = None) -> ScoreDistribution:
    found = ScoreDistribution.of(np.asarray(scores), None if weights is None else np.asarray(weights))
    assert found is not None
    return found


class TestStabilityIndex:
    def test_a_value_computed_by_hand(self):
        # (0.5 - 0.2) ln(0.5 / 0.2) + (0.3 - 0.3) ln 1 + (0.2 - 0.5) ln(0.2 / 0.5) = 0.6 ln 2.5
        assert stability_index([50, 30, 20], [200, 300, 500]) == pytest.approx(0.6 * 0.9162907, abs=1e-6)

    def test_an_empty_bin_counts_as_half_a_row(self):
        # (0.5 - 1) ln(0.5 / 1) + (0.5 - 0.005) ln(0.5 / 0.005)
        expected = 0.5 * math.log(2) + 0.495 * math.log(100)
        assert stability_index([50, 50], [100, 0]) == pytest.approx(expected)

    @given(PAIRS)
    @settings(max_examples=30)
    def test_it_is_symmetric_finite_and_never_negative(self, pair):
        first, second = pair
        value = stability_index(first, second)
        assert math.isfinite(value)
        assert value >= 0
        assert stability_index(second, first) == pytest.approx(value)

    @given(st.lists(st.integers(1, 1000), min_size=2, max_size=10), st.integers(1, 100))
    @settings(max_examples=20)
    def test_equal_shares_are_no_change(self, counts, times):
        assert stability_index(counts, [count * times for count in counts]) == pytest.approx(0, abs=1e-12)

    def test_what_chance_does(self):
        """The mean is (B - 1)(1/n + 1/m), and about one of 1,000 samples exceeds `index_by_chance`."""
        rng, rows, answers = np.random.default_rng(0), 500, 1_000
        found = []
        for _ in range(1_000):
            distribution = of(rng.random(rows))
            found.append(stability_index(distribution.counts, distribution.counts_of(rng.random(answers))))
        assert np.mean(found) == pytest.approx(9 * (1 / rows + 1 / answers), rel=0.05)
        assert np.mean(np.array(found) > index_by_chance(10, rows, answers)) <= 0.005
        assert np.quantile(found, 0.99) > index_by_chance(10, rows, answers) / 2, "no looser than it needs to be"

    @pytest.mark.parametrize("bins", range(2, 11))
    def test_the_quantiles_of_chi_squared(self, bins):
        assert gammaincc((bins - 1) / 2, index_by_chance(bins, 2, 2) / 2) == pytest.approx(0.001, rel=1e-3)


class TestBins:
    def test_deciles(self):
        found = of(np.arange(1000) / 1000)
        assert found.counts == pytest.approx((100,) * 10)
        assert found.edges == pytest.approx([0.0995 + 0.1 * bin_ for bin_ in range(9)])
        assert found.shares == pytest.approx((0.1,) * 10)

    @pytest.mark.parametrize(("rows", "bins"), [(49, 0), (50, 2), (75, 3), (249, 9), (250, 10), (10_000, 10)])
    def test_few_rows_make_few_bins(self, rows, bins):
        found = ScoreDistribution.of(np.random.default_rng(0).random(rows))
        assert (0 if found is None else len(found.counts)) == bins

    def test_equal_scores_share_a_bin(self):
        """As an isotonic curve makes them; no bin is empty, and rounding moves no score into another one."""
        scores = np.repeat([0.1, 0.4, 0.9], [600, 300, 100])
        found = of(scores)
        assert found.counts == pytest.approx((600, 300, 100))
        for off in (-1e-12, 0, 1e-12):
            assert found.counts_of(scores + off) == [600, 300, 100]

    @pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
    def test_scores_that_are_all_equal_have_no_distribution(self, score):
        assert ScoreDistribution.of(np.full(1000, score)) is None

    def test_no_rows(self):
        assert ScoreDistribution.of(np.array([])) is None
        assert ScoreDistribution.of(np.array([0.1, 0.2]), np.zeros(2)) is None

    def test_weights_count(self):
        scores = np.linspace(0, 1, 400)
        doubled = of(np.concatenate([scores, scores[:200]]))
        weighted = of(scores, np.where(np.arange(400) < 200, 2.0, 1.0))
        assert weighted.edges == pytest.approx(doubled.edges, abs=0.01)
        assert weighted.shares == pytest.approx(doubled.shares, abs=0.01)
        assert sum(weighted.counts) == pytest.approx(600**2 / 1000), "one row of weight 2 says less than two rows"

    def test_rows_without_weight_are_left_out(self):
        scores = np.linspace(0, 1, 400)
        assert of(scores, scores < 0.5) == of(scores[scores < 0.5])

    @pytest.mark.parametrize("seed", range(20))
    def test_scores_that_lie_close_together(self, seed):
        rng = np.random.default_rng(seed)
        close = [0.0, 5e-324, 0.2, np.nextafter(0.2, 1), 0.5, np.nextafter(1, 0), 1.0]
        scores = rng.choice(close, 200, p=rng.dirichlet(np.ones(len(close))))
        found = of(scores, rng.random(200) + 0.1)
        assert ScoreDistribution.from_json(json.loads(json.dumps(found.to_json()))) == found
        counted = found.counts_of(scores)
        assert min(counted) >= 1
        assert counted == np.bincount([found.bin_of(score) for score in scores]).tolist()


GOOD = {"edges": [0.2, 0.5], "counts": [10, 20.5, 1]}


class TestRecord:
    def test_round_trip(self):
        scores = np.random.default_rng(0).random(300)
        record = json.loads(json.dumps(distribution_record(scores)))
        assert recorded_distribution(record, name="claims") == of(scores)

    def test_too_few_rows_are_no_entry(self):
        assert distribution_record(np.random.default_rng(0).random(49)) == {}

    def test_no_entry(self, caplog):
        assert recorded_distribution({"method": "zero-shot"}, name="claims") is None
        assert not caplog.records

    @pytest.mark.parametrize(
        "entry",
        [
            None,
            [],
            "text",
            {},
            {"edges": [0.5]},
            GOOD | {"more": 1},
            GOOD | {"edges": None},
            GOOD | {"edges": []},
            GOOD | {"edges": [0.5]},
            GOOD | {"edges": [0.5, 0.2]},
            GOOD | {"edges": [0.5, 0.5]},
            GOOD | {"edges": [0.2, math.nan]},
            GOOD | {"edges": [0.2, 1.5]},
            GOOD | {"edges": [False, True]},
            GOOD | {"edges": ["0.2", "0.5"]},
            GOOD | {"edges": [[0.2], {}]},
            GOOD | {"counts": "abc"},
            GOOD | {"counts": [10, 0, 5]},
            GOOD | {"counts": [10, -1, 5]},
            GOOD | {"counts": [10, math.inf, 5]},
            GOOD | {"counts": [10, 10**400, 5]},
            GOOD | {"counts": [10, None, 5]},
            {"edges": [step / 1000 for step in range(1, 1000)], "counts": [1] * 1000},
        ],
    )
    def test_a_malformed_entry_is_one_line_of_the_log(self, entry, caplog):
        assert ScoreDistribution.from_json(GOOD).counts == (10, 20.5, 1)
        with caplog.at_level(logging.WARNING):
            assert recorded_distribution({RECORDED: entry}, name="claims") is None
        (line,) = caplog.records
        assert line.getMessage().startswith(
            "'claims': the score_distribution of its training record is ignored: expect"
        )
        assert len(line.getMessage()) < 200
