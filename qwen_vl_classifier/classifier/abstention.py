"""Decide when to abstain: in a band of probabilities around the threshold, as wide as a target error rate needs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import log_odds
from qwen_vl_classifier.config.spelling import named
from qwen_vl_classifier.errors import ConfigError, TrainingError


@dataclass(frozen=True, slots=True)
class Abstention:
    """A band of probabilities in which the classifier abstains, and its measured error rates.

    Attributes:
        band: Probabilities of class 1 in which to abstain, both ends included.
        target_error_rate: The largest expected share of all rows that is decided wrongly, where a row that is abstained
            on counts as a row and as no error.
        rows: Number of held-out rows that set the band.
        decided: The share of them that is decided.
        error_of_all: The share of them that is decided wrongly.
        error_of_decided: The share that is wrong of those that are decided; 0 where none is.
        guarantee: What may be relied on, in words.
    """

    band: tuple[float, float]
    target_error_rate: float
    rows: int
    decided: float
    error_of_all: float
    error_of_decided: float
    guarantee: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return dataclasses.asdict(self) | {"band": list(self.band)}


def abstention_band(
    probability: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[np.integer[Any]],
    threshold: float,
    target_error_rate: float,
) -> Abstention:
    """Find the narrowest band that keeps wrong decisions below a share of all rows.

    Split conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, 2022, arXiv:2208.02814, section 2.1).
    The loss of a row at width w is 1 if it is decided and wrong, else 0: it never grows with w. With n held-out rows
    and R(w) their mean loss, the band is as wide as the smallest w at which n / (n + 1) R(w) + 1 / (n + 1) is at most
    `target_error_rate`. Width is a distance from the threshold in log odds.

    What follows, and what does not: over draws of the held-out rows together with a new row that is exchangeable with
    them, the expected share of ALL rows that are decided wrongly is at most `target_error_rate`. It may be more for one
    draw of held-out rows, for one group of rows, or where rows have changed since. The error among decided
    rows is measured on these rows and not guaranteed; it is higher, as it is counted among fewer.

    Args:
        probability: Shape (n,), of class 1, of rows on which neither head nor calibration nor threshold was fitted.
        labels: Shape (n,), 0 or 1.
        threshold: Probability from which the label is 1.
        target_error_rate: The share, between 0 and 1.

    Raises:
        ConfigError: `target_error_rate` is out of its range.
        TrainingError: Too few rows for this share, even if every one of them were abstained on.
    """
    p = np.asarray(probability, dtype=np.float64)
    rows = len(p)
    allowed = check_rows(rows, target_error_rate)
    wrong = (p >= threshold) != (np.asarray(labels) == 1)
    distance = np.abs(log_odds(p) - log_odds(threshold))
    farthest_first = np.sort(distance[wrong])[::-1]
    width = float(farthest_first[allowed]) if len(farthest_first) > allowed else 0.0
    band = _band(threshold, width)
    inside = p[distance <= width]
    if len(inside):  # what rounding left outside
        band = (min(band[0], float(inside.min())), max(band[1], float(inside.max())))
    decided = (p < band[0]) | (p > band[1])
    errors = int((decided & wrong).sum())
    of_decided = errors / max(1, int(decided.sum()))
    return Abstention(
        band=band,
        target_error_rate=float(target_error_rate),
        rows=rows,
        decided=float(decided.mean()),
        error_of_all=errors / rows,
        error_of_decided=of_decided,
        guarantee=(
            f"on average over random draws of {rows} held-out rows and a new row like them, at most "
            f"{target_error_rate:.4g} of all rows "
            f"are expected to be decided wrongly; among decided rows, {of_decided:.4g} were wrong on the held-out "
            f"rows (measured, not guaranteed)"
        ),
    )


def check_rows(rows: int, target_error_rate: float) -> int:
    """Return how many of some held-out rows may be decided wrongly for a share to be kept.

    Raises:
        ConfigError: `target_error_rate` is out of its range.
        TrainingError: Too few rows for this share, even if every one of them were abstained on.
    """
    if not 0 < target_error_rate < 1:
        raise ConfigError(
            f"{named('target_error_rate')} {target_error_rate}: give a share above 0 and below 1, such as 0.05"
        )
    allowed = _floor(target_error_rate * (rows + 1)) - 1
    if allowed < 0:
        needed = -_floor(-1 / target_error_rate) - 1
        raise TrainingError(
            f"{named('target_error_rate')} {target_error_rate:g} with {rows} held-out rows: they cannot guarantee a "
            f"rate below {1 / (rows + 1):.3g}; hold out at least {needed} rows, or give a higher rate"
        )
    return allowed


def _floor(value: float) -> int:
    """Round down, but take 28.999999999999996, which is 0.29 * 100, for 29."""
    return math.floor(value + 1e-9)


def _band(threshold: float, width: float) -> tuple[float, float]:
    """Return the ends of a band; one that reaches as far as log odds are told apart reaches 0, or 1."""
    middle, most = float(log_odds(threshold)), float(log_odds(1.0))
    low, high = middle - width, middle + width
    return (
        0.0 if low <= float(log_odds(0.0)) else min(threshold, 1 / (1 + math.exp(-low))),
        1.0 if high >= most else max(threshold, 1 / (1 + math.exp(-high))),
    )
