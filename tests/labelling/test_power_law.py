"""Power laws: known ones are found again, and what the points cannot tell stays wide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.labelling.power_law import fit_power_laws

LABELS = np.array([50.0, 70.0, 100.0, 140.0, 200.0, 400.0])


def curves(level: float, scale: float, rate: float, noise: float, draws: int = 100):
    exact = level + scale * LABELS**-rate
    errors = exact + np.random.default_rng(0).normal(size=(draws, len(LABELS))) * noise
    return fit_power_laws(LABELS, errors, np.eye(len(LABELS)) * noise**2)


@given(st.floats(0, 0.3), st.floats(0.5, 5), st.floats(0.4, 1.5))
def test_a_power_law_is_found_again(level, scale, rate):
    laws = curves(level, scale, rate, 1e-6)
    for labels in (50, 300, 450):
        assert np.median(laws.errors(labels)) == pytest.approx(level + scale * labels**-rate, abs=0.002)
    assert np.median(laws.level) == pytest.approx(level, abs=0.03)


def test_noise_makes_the_level_wide():
    exact, noisy = (curves(0.1, 1, 0.6, noise) for noise in (1e-5, 0.02))
    assert np.ptp(np.percentile(noisy.level, [5, 95])) > 3 * np.ptp(np.percentile(exact.level, [5, 95]))


def test_errors_that_rise_are_a_flat_curve():
    laws = fit_power_laws(LABELS, np.linspace(0.1, 0.2, 6)[None], np.eye(6) * 1e-4)
    assert laws.scale.tolist() == [0]
    assert laws.level[0] == pytest.approx(0.15, abs=0.02)
    assert laws.errors(1000).tolist() == laws.level.tolist()
