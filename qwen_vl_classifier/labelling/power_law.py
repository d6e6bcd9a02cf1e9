"""Learning curves as power laws: error = level + scale * labels ** -rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_vl_classifier.classifier.probabilities import Float

_RATES = np.geomspace(0.25, 2.5, 24)
_USUAL_RATE, _SPREAD = 0.8, 0.7  # of log rates, around the usual one
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class PowerLaws:
    """Curves that may be true, one for each draw.

    Attributes:
        level: Shape (draws,), the error at any number of labels; 0 or more.
        scale: Shape (draws,), 0 or more.
        rate: Shape (draws,), above 0.
    """

    level: Float
    scale: Float
    rate: Float

    def errors(self, labels: float) -> Float:
        """Return the error at a number of labels, shape (draws,)."""
        found: Float = self.level + self.scale * labels**-self.rate
        return found


def fit_power_laws(labels: Float, errors: Float, covariance: Float, *, seed: int = 0) -> PowerLaws:
    """Fit a power law to each draw of measured errors.

    Errors fall with the number of examples as a power law down to a level (Hestness et al., 2017, "Deep learning
    scaling is predictable, empirically", arXiv:1712.00409; Viering and Loog, 2021, "The shape of learning curves: a
    review", arXiv:2103.10948). A few noisy points hardly tell the rate, and with it the level: for each draw a rate is
    drawn by how well it fits and by how usual it is, and the rest is fitted by least squares, level and scale being 0
    or more.

    Args:
        labels: Shape (points,), above 0.
        errors: Shape (draws, points).
        covariance: Shape (points, points), of the errors.
        seed: Of the draws of rates.
    """
    points = len(labels)
    jitter = _ROUNDING + 1e-3 * float(np.trace(covariance)) / points
    whiten = np.linalg.inv(np.linalg.cholesky(covariance + jitter * np.eye(points)))
    target = errors @ whiten.T
    unit = labels / labels.max()
    one = whiten @ np.ones(points)
    levels, scales, misfits = [], [], []
    for rate in _RATES:
        curve = whiten @ unit**-rate
        level, scale = _least_squares(one, curve, target)
        levels.append(level)
        scales.append(scale)
        misfits.append(((target - level[:, None] * one - scale[:, None] * curve) ** 2).sum(axis=1))
    likelihood = -np.array(misfits).T / 2 - (np.log(_RATES / _USUAL_RATE) / _SPREAD) ** 2 / 2
    noise = np.random.default_rng(seed).gumbel(size=likelihood.shape)  # the greatest sum is a draw by likelihood
    chosen = (likelihood + noise).argmax(axis=1)
    draws = np.arange(len(errors))
    rate = _RATES[chosen]
    return PowerLaws(np.array(levels)[chosen, draws], np.array(scales)[chosen, draws] * labels.max() ** rate, rate)


def _least_squares(one: Float, curve: Float, target: Float) -> tuple[Float, Float]:
    """Solve target = level * one + scale * curve for each line of targets, both 0 or more."""
    a, b, c = one @ one, one @ curve, curve @ curve
    p, q = target @ one, target @ curve
    determinant = max(float(a * c - b * b), _ROUNDING)
    level, scale = (c * p - b * q) / determinant, (a * q - b * p) / determinant
    flat, steep = scale < 0, level < 0
    level = np.where(flat, np.maximum(p / a, 0.0), np.where(steep, 0.0, level))
    scale = np.where(flat, 0.0, np.where(steep, np.maximum(q / c, 0.0), scale))
    return level, scale
