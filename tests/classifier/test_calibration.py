"""Calibration against torch's softmax and a search by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from qwen_vl_classifier.classifier import calibration as module
from qwen_vl_classifier.classifier.calibration import (
    MOST_KNOTS,
    Calibration,
    cross_fitted,
    fit_calibration,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    refitted,
)
from qwen_vl_classifier.classifier.probabilities import log_loss, margins_of, probabilities


def log_losses(logits: np.ndarray, labels: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """The log loss against Platt's targets, with that of the prior, at each of some temperatures, by torch."""
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    target = torch.from_numpy(np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2)))
    scaled = torch.from_numpy(logits).double() / torch.from_numpy(temperatures).double()[:, None, None]
    rows = scaled.log_softmax(dim=-1)
    losses = -(target * rows[..., 1] + (1 - target) * rows[..., 0]).mean(dim=1).numpy()
    return losses + (np.log(temperatures) / 0.5) ** 2 / 2 / len(labels)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1.7, 20.0])
def test_probabilities_are_torchs_softmax(temperature):
    logits = np.random.default_rng(0).normal(scale=5, size=(200, 2)).astype(np.float32)
    wanted = (torch.from_numpy(logits).double() / temperature).softmax(dim=-1).numpy()
    seen = probabilities(logits, temperature)
    assert seen.dtype == np.float64
    np.testing.assert_allclose(seen, wanted, rtol=1e-12, atol=1e-300)


@given(
    logits=arrays.arrays(np.float32, (3, 2), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    temperature=st.floats(1e-6, 1e6),
)
def test_any_finite_logits_give_probabilities(logits, temperature):
    seen = probabilities(logits, temperature)
    assert np.isfinite(seen).all()
    assert ((seen >= 0) & (seen <= 1)).all()
    np.testing.assert_allclose(seen.sum(axis=1), 1, rtol=1e-12)
    higher = logits[:, 1] > logits[:, 0]
    assert (seen[higher, 1] >= 0.5).all()
    assert (seen[~higher, 1] <= 0.5).all()


def test_no_logits():
    assert probabilities(np.zeros((0, 2), dtype=np.float32)).shape == (0, 2)


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_fine_grid(true_temperature):
    rng = np.random.default_rng(1)
    margin = rng.normal(scale=2, size=3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(-margin))).astype(np.int64)
    logits = np.stack([np.zeros(3000), margin], axis=1) * true_temperature
    grid = np.geomspace(0.05, 20, 601)
    losses = log_losses(logits, labels, grid)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(grid[losses.argmin()], rel=0.02)
    assert found == pytest.approx(true_temperature, rel=0.15)
    assert log_losses(logits, labels, np.array([found]))[0] <= losses.min() + 1e-9


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[0, 1], [1, 0]], [1, 0]),  # all right: nothing but the bound stops certainty
        ([[0, 1], [1, 0]], [0, 1]),  # all wrong
        ([[0, 0], [0, 0]], [0, 1]),
        ([[-3e38, 3e38], [3e38, -3e38], [0, 1]], [1, 0, 0]),
        ([[-3e38, 3e38]], [0]),
    ],
)
def test_extreme_logits_give_a_temperature_within_bounds(logits, labels):
    found = fit_temperature(np.array(logits, dtype=np.float32), np.array(labels))
    assert 0.05 <= found <= 20


def test_a_few_rows_that_are_all_right_are_no_proof_of_certainty():
    labels = np.arange(12) % 2
    logits = np.stack([np.zeros(12), np.where(labels, 3.0, -3.0)], axis=1)
    assert fit_temperature(logits, labels) > 1


def test_a_few_rows_stay_near_what_there_was_before():
    margins, labels = sample(10, scale=0.1)
    logits = logits_of(margins)
    assert 1 < fit_temperature(logits, labels) < 3
    assert 4 < fit_temperature(logits, labels, prior=5.0) < 8
    margins, labels = sample(5000, scale=0.1)
    logits = logits_of(margins)
    assert fit_temperature(logits, labels) == pytest.approx(fit_temperature(logits, labels, prior=5.0), rel=0.1)
    assert fit_temperature(logits, labels) > 7


def test_calibration_keeps_the_order():
    logits = np.random.default_rng(2).normal(size=(50, 2))
    order = np.argsort(logits[:, 1] - logits[:, 0])
    for temperature in (0.1, 9.0):
        assert (np.diff(probabilities(logits, temperature)[order, 1]) >= 0).all()


def logits_of(margins: np.ndarray) -> np.ndarray:
    """Logits of some margins, with a part that both share, which must not matter."""
    shared = np.random.default_rng(9).normal(size=len(margins))
    return np.stack([shared, shared + margins], axis=1)


def sample(rows: int, *, seed: int = 0, scale: float = 1.0, bias: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Margins, and labels that follow the line scale * margin + bias."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(scale=2, size=rows)
    return margins, (rng.random(rows) < 1 / (1 + np.exp(-(scale * margins + bias)))).astype(np.int64)


def stepped(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels that no temperature can bring together: the share of class 1 is a step."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(scale=2, size=rows)
    return logits_of(margins), (rng.random(rows) < np.where(margins > 1, 0.7, 0.2)).astype(np.int64)


class TestWeightsAndSoftTargets:
    """A weight of two is a row twice; a soft target is a row of each class."""

    FITS = (
        lambda logits, targets, weights=None: (fit_temperature(logits, targets, weights=weights),),
        lambda logits, targets, weights=None: fit_platt(margins_of(logits), targets, weights=weights),
        lambda logits, targets, weights=None: fit_isotonic(logits, targets, weights=weights).isotonic[1][1:-1],
    )

    @pytest.mark.parametrize("fit", FITS, ids=["temperature", "platt", "isotonic"])
    def test_weights(self, fit):
        margins, labels = sample(60, scale=0.5)
        logits, times = logits_of(margins), np.arange(60) % 3 + 1
        wanted = fit(np.repeat(logits, times, axis=0), np.repeat(labels, times))
        np.testing.assert_allclose(fit(logits, labels, times.astype(float)), wanted, rtol=1e-3)
        assert not np.allclose(fit(logits, labels)[0], wanted[0], rtol=1e-3) or len(wanted) > 2

    @pytest.mark.parametrize("fit", FITS[:2], ids=["temperature", "platt"])
    def test_soft_targets(self, fit):
        margins, _ = sample(40)
        logits, targets = logits_of(margins), np.round(1 / (1 + np.exp(-2 * margins)), 2)
        both = np.concatenate([np.ones(40), np.zeros(40)])
        wanted = fit(np.tile(logits, (2, 1)), both, np.concatenate([targets, 1 - targets]))
        np.testing.assert_allclose(fit(logits, targets), wanted, rtol=1e-3)

    def test_whole_and_real_labels_are_the_same(self):
        margins, labels = sample(50)
        assert fit_temperature(logits_of(margins), labels) == fit_temperature(logits_of(margins), labels.astype(float))


class TestPlatt:
    """Scale and bias for answers that lean to one side."""

    def test_it_is_the_least_log_loss_against_platts_targets(self):
        margins, labels = sample(200, scale=0.7, bias=-1.5)
        positive, negative = labels.sum(), (1 - labels).sum()
        target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))

        def loss(line: np.ndarray) -> float:
            logit = line[0] * margins + line[1]
            return float(np.mean(np.logaddexp(0, logit) - target * logit))

        wanted = minimize(loss, x0=[0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15}).x
        np.testing.assert_allclose(fit_platt(margins, labels), wanted, rtol=1e-3)

    @pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (0.3, 2.0), (3.0, -4.0)])
    def test_it_finds_the_line(self, scale, bias):
        found = fit_platt(*sample(20_000, scale=scale, bias=bias))
        np.testing.assert_allclose(found, (scale, bias), rtol=0.1, atol=0.1)

    @pytest.mark.parametrize("unit", [1e-4, 1.0, 1e6])
    def test_units_and_an_offset_do_not_matter(self, unit):
        margins, labels = sample(100, scale=0.7)
        scale, bias = fit_platt(margins, labels)
        other_scale, other_bias = fit_platt((margins - 20) * unit, labels)
        seen = other_scale * (margins - 20) * unit + other_bias
        np.testing.assert_allclose(seen, scale * margins + bias, atol=1e-3)

    def test_answers_worse_than_chance_are_flattened_and_not_turned_round(self):
        margins, labels = sample(500)
        scale, bias = fit_platt(margins, 1 - labels)
        probability = 1 / (1 + np.exp(-(scale * margins + bias)))
        assert scale > 0
        assert np.ptp(probability) < 0.03
        assert probability.mean() == pytest.approx(1 - labels.mean(), abs=0.01)

    def test_answers_that_are_all_the_same_give_the_share_of_class_1(self):
        scale, bias = fit_platt(np.full(8, 5.3), np.array([1, 0, 0, 0, 0, 0, 0, 0]))
        assert 0 < scale <= 1.1
        assert 1 / (1 + np.exp(-(scale * 5.3 + bias))) == pytest.approx((2 / 3 + 7 / 9) / 8, abs=1e-3)

    def test_a_few_rows_that_are_all_right_are_no_proof_of_certainty(self):
        scale, bias = fit_platt(np.array([-15.0, -14.0, 14.0, 15.0]), np.array([0, 0, 1, 1]))
        assert 1 / (1 + np.exp(-(scale * 15 + bias))) < 0.85

    @given(
        margins=arrays.arrays(np.float32, 6, elements=st.floats(-(2.0**126), 2.0**126, width=32)),
        labels=arrays.arrays(np.int64, 6, elements=st.integers(0, 1)),
    )
    def test_any_finite_margins_give_a_finite_line(self, margins, labels):
        scale, bias = fit_platt(margins, labels)
        assert scale > 0
        assert np.isfinite([scale, bias]).all()


class TestIsotonic:
    """A rising curve, kept only where it pays."""

    def test_it_is_scikit_learns_within_its_bounds(self):
        logits, labels = stepped(300)
        found = fit_isotonic(logits, labels)
        p = probabilities(logits, found.temperature)[:, 1]
        wanted = IsotonicRegression(out_of_bounds="clip").fit(p, labels).predict(p)
        np.testing.assert_allclose(found.apply(logits)[:, 1], np.clip(wanted, 1 / 302, 301 / 302), atol=1e-12)
        np.testing.assert_allclose(found.apply(logits).sum(axis=1), 1)

    def test_no_surprise_costs_an_infinite_loss(self):
        margins = np.linspace(-5, 5, 100)
        found = fit_isotonic(logits_of(margins), (margins > 0).astype(int))
        p = found.apply(logits_of(np.array([-50.0, 50.0])))[:, 1]
        np.testing.assert_allclose(p, [1 / 102, 101 / 102])

    def test_it_is_flat_beyond_its_ends_and_straight_between(self):
        curve = Calibration(1.0, ((0.2, 0.4), (0.1, 0.5)))
        p = np.array([0.01, 0.2, 0.3, 0.4, 0.99])
        seen = curve.apply(logits_of(np.log(p / (1 - p))))
        np.testing.assert_allclose(seen[:, 1], [0.1, 0.1, 0.3, 0.5, 0.5])
        np.testing.assert_allclose(seen[:, 0], 1 - seen[:, 1])

    def test_it_has_no_more_knots_than_can_be_saved(self):
        margins = np.linspace(-3, 3, 5000)
        targets = 1 / (1 + np.exp(-3 * margins))
        found = fit_isotonic(logits_of(margins), targets)
        inputs, outputs = found.isotonic
        assert len(inputs) == len(outputs) == MOST_KNOTS
        assert (np.diff(inputs) > 0).all()
        assert (np.diff(outputs) >= 0).all()
        np.testing.assert_allclose(found.apply(logits_of(margins))[:, 1], targets, atol=1e-3)

    def test_it_is_kept_where_it_pays(self):
        logits, labels = stepped(1001)
        found = fit_calibration(logits, labels)
        assert found.calibration.isotonic is not None
        assert found.record["method"] == "isotonic"
        assert fit_calibration(logits, labels, isotonic=False).record["method"] == "temperature"
        fresh, fresh_labels = stepped(20_000, seed=1)
        temperature = Calibration(fit_temperature(logits, labels))
        losses = [log_loss(c.apply(fresh)[:, 1], fresh_labels) for c in (found.calibration, temperature)]
        assert losses[0] < losses[1] - 0.02

    def test_it_is_not_kept_where_it_does_not(self):
        margins, labels = sample(1500, scale=0.5)
        found = fit_calibration(logits_of(margins), labels)
        assert found.calibration == Calibration(fit_temperature(logits_of(margins), labels))
        assert found.record["tried"].keys() == {"none", "temperature", "isotonic"}

    def test_a_thousand_rows_are_too_few(self):
        logits, labels = stepped(1000)
        assert fit_calibration(logits, labels).calibration.isotonic is None

    def test_one_group_proves_nothing(self):
        logits, labels = stepped(1500)
        found = fit_calibration(logits, labels, groups=np.zeros(1500, dtype=int))
        assert found.calibration == Calibration()
        assert found.record["method"] == "none"

    def test_rows_that_belong_together_do_not_speak_for_each_other(self):
        """Each of 30 groups has its own place and its own share: what one tells says nothing of the next."""
        rng = np.random.default_rng(3)
        groups = np.repeat(np.arange(30), 50)
        margins = rng.normal(scale=2, size=30)[groups] + rng.normal(scale=0.01, size=1500)
        labels = rng.permutation(np.arange(30) % 2)[groups]
        assert fit_calibration(logits_of(margins), labels).calibration.isotonic is not None
        assert fit_calibration(logits_of(margins), labels, groups=groups).calibration.isotonic is None


class TestKeeping:
    """A calibration is kept only where it helps rows that it was not fitted on."""

    @pytest.mark.parametrize("seed", range(8))
    def test_the_record_never_gets_worse(self, seed):
        rng = np.random.default_rng(seed)
        margins, labels = sample(int(rng.integers(6, 80)), seed=seed, scale=float(rng.uniform(0.2, 2)))
        record = fit_calibration(logits_of(margins), labels).record
        assert record["log_loss_after"] <= record["log_loss_before"]
        assert record["log_loss_before"] == pytest.approx(sklearn.metrics.log_loss(labels, 1 / (1 + np.exp(-margins))))
        assert (record["method"] == "none") == (record["log_loss_after"] == record["log_loss_before"])

    def test_sure_answers_that_are_all_right_are_left_as_they_are(self):
        labels = np.arange(20) % 2
        found = fit_calibration(logits_of(np.where(labels, 7.0, -7.0)), labels)
        assert found.calibration == Calibration()
        assert found.record["log_loss_after"] == found.record["log_loss_before"] == pytest.approx(9e-4, abs=1e-4)
        assert found.record["tried"]["temperature"] > 9e-4

    def test_answers_that_are_too_sure_are_calibrated(self):
        margins, labels = sample(300, scale=0.2)
        found = fit_calibration(logits_of(margins), labels)
        assert found.calibration.temperature == fit_temperature(logits_of(margins), labels) > 3
        assert found.record["log_loss_after"] < found.record["log_loss_before"] - 0.1

    def test_what_there_was_is_kept_unless_another_is_better(self):
        margins, labels = sample(300, scale=0.2)
        logits = logits_of(margins)
        right, wrong = Calibration(5.0), Calibration(1.0, ((0.1, 0.9), (0.9, 0.91)))
        losses = [log_loss(one.apply(logits)[:, 1], labels) for one in (right, wrong)]
        for start, loss in zip((right, wrong), losses, strict=True):
            assert fit_calibration(logits, labels, start=start).record["log_loss_before"] == loss
        assert fit_calibration(logits, labels, start=right).calibration.temperature == pytest.approx(5, rel=0.3)
        assert fit_calibration(logits, labels, start=wrong).calibration.isotonic is None
        one_group = np.zeros(300, dtype=int)  # which says nothing of unseen rows
        assert fit_calibration(logits, labels, groups=one_group, start=wrong).calibration == wrong

    def test_a_line_for_zero_shot(self):
        margins, labels = sample(4000, scale=0.25, bias=1.0)
        found = fit_calibration(logits_of(margins), labels, zero_shot=True)
        assert found.line == fit_platt(margins_of(logits_of(margins)), labels)
        record = found.record
        assert (record["rows"], record["method"]) == (4000, "platt")
        assert record["log_loss_after"] < record["log_loss_before"] - 0.1
        assert record["ece_after"] < 0.03 < 0.2 < record["ece_before"]
        margins, labels = sample(10)
        kept = fit_calibration(logits_of(margins), labels, zero_shot=True)
        assert (kept.line is None) == (kept.record["method"] == "none")

    def test_the_same_kind_is_fitted_to_other_rows(self):
        logits, labels = stepped(300)
        assert refitted(Calibration(), logits, labels) == Calibration()
        assert refitted(Calibration(7.0), logits, labels) == Calibration(fit_temperature(logits, labels))
        assert refitted(Calibration(1.0, ((0.1,), (0.2,))), logits, labels) == fit_isotonic(logits, labels)


class TestCrossFitting:
    """What a calibration is worth is seen on rows that it was not fitted on."""

    @pytest.mark.parametrize("method", ["temperature", "isotonic", "platt"])
    def test_groups_stay_whole(self, method, monkeypatch):
        margins, labels = sample(100)
        groups = np.random.default_rng(0).integers(0, 12, 100)
        seen = []
        fit = module._fit_line if method == "platt" else module._FITS[method]

        def watched(logits, targets, **given):
            seen.append({int(group) for group in groups if (logits[:, 1] == numbered[groups == group][0, 1]).any()})
            return fit(logits, targets, **given)

        numbered = np.stack([np.zeros(100), margins], axis=1)
        if method == "platt":
            monkeypatch.setattr(module, "_fit_line", watched)
        else:
            monkeypatch.setitem(module._FITS, method, watched)
        both = cross_fitted(method, numbered, labels, groups=groups)
        assert len(seen) == 5
        unseen = [set(groups.tolist()) - kept for kept in seen]
        assert sorted(group for part in unseen for group in part) == sorted(set(groups.tolist()))
        np.testing.assert_allclose(both.sum(axis=1), 1)

    def test_a_row_does_not_speak_for_itself(self):
        margins, labels = sample(60)
        before = cross_fitted("isotonic", logits_of(margins), labels)
        labels[7] = 1 - labels[7]
        after = cross_fitted("isotonic", logits_of(margins), labels)
        assert before[7, 1] == after[7, 1]
        assert (before[:, 1] != after[:, 1]).any()

    def test_a_single_group_is_calibrated_by_itself(self):
        margins, labels = sample(30)
        wanted = probabilities(logits_of(margins), fit_temperature(logits_of(margins), labels))
        seen = cross_fitted("temperature", logits_of(margins), labels, groups=np.zeros(30, dtype=int))
        np.testing.assert_array_equal(seen, wanted)
