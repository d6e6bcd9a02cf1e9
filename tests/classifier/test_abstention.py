"""The band of abstention: its definition by brute force, and the guarantee by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwen_vl_classifier.classifier.abstention import Abstention, abstention_band
from qwen_vl_classifier.errors import ConfigError, TrainingError

VALUES = (0.0, 1e-30, 0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.98, 1 - 1e-12, 1.0)
ROWS = st.lists(st.tuples(st.one_of(st.sampled_from(VALUES), st.floats(0, 1)), st.integers(0, 1)), max_size=30)
THRESHOLDS = st.one_of(st.sampled_from(VALUES), st.floats(0, 1))


def arrays(rows: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p for p, _ in rows], dtype=float), np.array([label for _, label in rows], dtype=int)


def decided_wrongly(p: np.ndarray, labels: np.ndarray, threshold: float, band: tuple[float, float]) -> np.ndarray:
    """Which rows are decided wrongly, as `Classifier.decision_of` decides."""
    abstains = (band[0] <= p) & (p <= band[1])
    return ~abstains & ((p >= threshold) != (labels == 1))


def enough(rows: int, target_error_rate: float) -> bool:
    return target_error_rate * (rows + 1) > 1 - 1e-12


@given(ROWS, THRESHOLDS, st.sampled_from([0.04, 0.05, 0.1, 0.29, 0.5, 0.9]))
def test_the_bound_holds_on_the_held_out_rows(rows, threshold, target_error_rate):
    p, labels = arrays(rows)
    assume(enough(len(p), target_error_rate))
    found = abstention_band(p, labels, threshold, target_error_rate)
    low, high = found.band
    assert 0 <= low <= threshold <= high <= 1
    wrong = decided_wrongly(p, labels, threshold, found.band)
    decided = (p < low) | (p > high)
    assert (wrong.sum() + 1) / (len(p) + 1) <= target_error_rate + 1e-9
    assert found.rows == len(p)
    assert found.decided == decided.mean()
    assert found.error_of_all == wrong.mean()
    assert found.error_of_decided == (wrong.sum() / decided.sum() if decided.any() else 0)


@given(ROWS, st.sampled_from([0.02, 0.3, 0.5, 0.8]), st.sampled_from([0.05, 0.1, 0.29, 0.5]))
def test_no_narrower_band_would_do(rows, threshold, target_error_rate):
    p, labels = arrays(rows)
    assume(enough(len(p), target_error_rate))
    p = np.clip(p, 1e-6, 1 - 1e-6)
    found = abstention_band(p, labels, threshold, target_error_rate)
    distance = np.abs(np.log(p / (1 - p)) - math.log(threshold / (1 - threshold)))
    width = max(distance[(found.band[0] <= p) & (p <= found.band[1])], default=0.0)
    wrong = (p >= threshold) != (labels == 1)
    for narrower in (0.0, *distance[distance < width - 1e-9]):
        if width > 1e-9:
            assert ((distance > narrower + 1e-12) & wrong).sum() + 1 > target_error_rate * (len(p) + 1)


def test_the_band_is_symmetric_in_log_odds():
    p = np.array([0.9, 0.05, *[0.999] * 50])
    labels = np.array([0, 0, *[1] * 50])
    low, high = abstention_band(p, labels, 0.3, 0.02).band

    def log_odds(probability: float) -> float:
        return math.log(probability / (1 - probability))

    assert high == 0.9
    assert log_odds(0.3) - log_odds(low) == pytest.approx(log_odds(0.9) - log_odds(0.3))


def test_nothing_to_abstain_on():
    found = abstention_band(np.linspace(0, 1, 40), (np.linspace(0, 1, 40) > 0.5).astype(int), 0.5, 0.05)
    assert found.band == (0.5, 0.5)
    assert (found.decided, found.error_of_all, found.error_of_decided) == (1.0, 0.0, 0.0)


def test_rows_that_tie_with_a_wrong_one_are_abstained_on_with_it():
    p = np.array([0.7] * 10 + [0.95] * 20)
    labels = np.array([0] * 2 + [1] * 8 + [1] * 20)
    found = abstention_band(p, labels, 0.5, 0.05)
    assert found.band[1] == 0.7
    assert found.decided == 20 / 30


@pytest.mark.parametrize(("threshold", "p", "label", "end"), [(0.0, 1e-300, 0, 0), (1.0, 1 - 1e-17, 0, 1)])
def test_a_threshold_at_an_end(threshold, p, label, end):
    found = abstention_band(np.full(30, p), np.full(30, label), threshold, 0.05)
    assert found.band[end] == threshold
    assert found.decided == 0


def test_surely_wrong_rows_leave_nothing_to_decide():
    p = np.array([0.0, 1.0] * 20)
    found = abstention_band(p, 1 - p.astype(int), 0.5, 0.05)
    assert found.band == (0.0, 1.0)
    assert found.decided == 0


@pytest.mark.parametrize(("target_error_rate", "needed"), [(0.05, 19), (0.1, 9), (0.03, 33), (0.29, 3), (0.5, 1)])
def test_too_few_rows_say_how_many_it_takes(target_error_rate, needed):
    p = np.full(needed, 0.9)
    abstention_band(p, np.ones(needed, dtype=int), 0.5, target_error_rate)
    with pytest.raises(TrainingError, match=f"hold out at least {needed} rows") as seen:
        abstention_band(p[1:], np.ones(needed - 1, dtype=int), 0.5, target_error_rate)
    assert "\n" not in str(seen.value)


@pytest.mark.parametrize("target_error_rate", [0, 1, -0.1, 5, float("nan")])
def test_an_impossible_share(target_error_rate):
    with pytest.raises(ConfigError, match="target_error_rate"):
        abstention_band(np.full(100, 0.9), np.ones(100, dtype=int), 0.5, target_error_rate)


def test_it_says_what_is_guaranteed_and_what_is_not():
    rng = np.random.default_rng(0)
    p = rng.random(300)
    found = abstention_band(p, (rng.random(300) < p).astype(int), 0.5, 0.05)
    assert "at most 0.05 of all rows are expected to be decided wrongly" in found.guarantee
    assert f"among decided rows, {found.error_of_decided:.4g} were wrong on the held-out rows" in found.guarantee
    assert "not guaranteed" in found.guarantee
    assert 0 < found.error_of_all < found.error_of_decided
    content = json.loads(json.dumps(found.to_json()))
    assert Abstention(**content | {"band": tuple(content["band"])}) == found


def mean_error(
    rows: int, target_error_rate: float, draws: int, seed: int, *, corrected: bool = True
) -> tuple[float, float]:
    """Mean probability, over draws of held-out rows, that a new row is decided wrongly, and its standard error.

    Probabilities are surer than they should be, which the guarantee has to bear. Log odds are normal with deviation 2;
    the probability that a new row is decided wrongly is their integral outside of the band.
    """
    rng = np.random.default_rng(seed)
    errors = []
    new = np.linspace(-16, 16, 6401)
    density = np.exp(-(new**2) / 8)
    density /= density.sum()
    wrong = density / (1 + np.exp(np.abs(new)))
    new_p = 1 / (1 + np.exp(-2 * new))
    for _ in range(draws):
        log_odds = rng.normal(scale=2, size=rows)
        labels = (rng.random(rows) < 1 / (1 + np.exp(-log_odds))).astype(int)
        p = 1 / (1 + np.exp(-2 * log_odds))
        # Without its term 1 / (n + 1), the rule is R(w) <= target_error_rate, which is the rule at another level.
        level = target_error_rate if corrected else (target_error_rate * rows + 1) / (rows + 1)
        band = abstention_band(p, labels, 0.5, level).band
        errors.append(wrong[(new_p < band[0]) | (new_p > band[1])].sum())
    return float(np.mean(errors)), float(np.std(errors) / math.sqrt(draws))


@pytest.mark.parametrize(("rows", "target_error_rate"), [(10, 0.1), (19, 0.05), (30, 0.1), (60, 0.05)])
def test_the_guarantee_holds_over_draws(rows, target_error_rate):
    mean, error = mean_error(rows, target_error_rate, draws=300, seed=rows)
    assert target_error_rate / 4 < mean <= target_error_rate + 3 * error


@pytest.mark.parametrize(("rows", "target_error_rate"), [(10, 0.1), (30, 0.1), (60, 0.05)])
def test_without_its_correction_it_would_not_hold(rows, target_error_rate):
    mean, error = mean_error(rows, target_error_rate, draws=300, seed=rows, corrected=False)
    assert mean > target_error_rate + 3 * error


@pytest.mark.soak
def test_the_guarantee_holds_over_very_many_draws():
    for rows, target_error_rate in ((10, 0.1), (19, 0.05), (100, 0.02), (500, 0.05)):
        mean, error = mean_error(rows, target_error_rate, draws=20_000, seed=rows)
        assert target_error_rate / 4 < mean <= target_error_rate + 3 * error
