"""Check that a panel uses pictures and texts: how much its labels are ranked worse with those of other rows.

The interval of a mean over a hundred labels comes from what each row contributes to the AUROC of each label, not from
resamples: it takes no longer than the AUROCs themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from scipy.stats import t as student

from qwen_vl_classifier.data.targets import MISSING
from qwen_vl_classifier.evaluation.checks import CHECKS, Altered
from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities


def judge_panel_checks(
    planned: Mapping[str, Altered | str],
    after: Mapping[str, Probabilities],
    labels: Labels,
    probabilities: Probabilities,
    groups: npt.NDArray[np.int64],
    names: Sequence[str],
    *,
    positions: npt.NDArray[np.int64],
) -> dict[str, dict[str, Any]]:
    """Compare the probabilities of altered rows with those of the rows as they are.

    Args:
        planned: As `plan_checks` gave it.
        after: For each check that has rows, their probabilities, shape (rows, labels); NaN where there is none.
        labels: Shape (n, labels): 0, 1 or `MISSING`.
        probabilities: Shape (n, labels), of the examples as they are.
        groups: Shape (n,), numbers of groups.
        names: Of the labels.
        positions: Where each of the planned examples is among these n; -1 for those that were left out.

    Returns:
        For each of `CHECKS`: `reason` why it could not be made, or `None`; `rows`; `auroc`, the mean over labels:
        `before`, `after`, `drop`, `low` and `high` (95 %), or `None`; `free`, whether the interval of the drop reaches
        0; and `labels`, the same figures of each label that has both classes among these rows, with its `name`.
    """
    found = {}
    for name in CHECKS:
        altered = planned[name]
        if isinstance(altered, str):
            found[name] = _not_made(altered)
            continue
        kept = np.isfinite(after[name]).all(axis=1) & (positions[altered.rows] >= 0)
        rows = positions[altered.rows[kept]]
        if not len(rows):
            found[name] = _not_made("all rows have the same picture")
            continue
        found[name] = _compare(labels[rows], probabilities[rows], after[name][kept], groups[rows], names)
    return found


def _not_made(reason: str) -> dict[str, Any]:
    return {"reason": reason, "rows": 0, "auroc": None, "free": None, "labels": []}


def _compare(
    labels: Labels,
    before: Probabilities,
    after: Probabilities,
    groups: npt.NDArray[np.int64],
    names: Sequence[str],
) -> dict[str, Any]:
    entries, influences = [], []
    for column, name in enumerate(names):
        known = np.flatnonzero(labels[:, column] != MISSING)
        own = labels[known, column]
        if len(np.unique(own)) < 2:
            continue
        (was, had), (now, has) = (auroc_influence(own, side[known, column]) for side in (before, after))
        influence = np.zeros(len(labels))
        influence[known] = had - has
        influences.append(influence)
        entries.append({"name": name} | _drop(was, now, influence, groups))
    if not entries:
        return _not_made("no label has both classes among these rows")
    was, now = (float(np.mean([entry[side] for entry in entries])) for side in ("before", "after"))
    auroc = _drop(was, now, np.mean(influences, axis=0), groups)
    return {"reason": None, "rows": len(labels), "auroc": auroc, "free": auroc["low"] <= 0, "labels": entries}


def auroc_influence(labels: Labels, probabilities: Probabilities) -> tuple[float, npt.NDArray[np.float64]]:
    """Return an AUROC and how much each row contributes to its error.

    Sums of squares of these are its variance (DeLong, DeLong and Clarke-Pearson, 1988, "Comparing the areas under two
    or more correlated receiver operating characteristic curves"); rows of one group are summed first (Obuchowski, 1997,
    "Nonparametric analysis of clustered ROC curve data").

    Args:
        labels: Shape (n,), 0 or 1, both of which occur.
        probabilities: Shape (n,), of class 1.
    """
    positive = labels == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(probabilities)
    wins = np.empty(len(labels))  # of each row, the share of the other class that it is on the right side of
    wins[positive] = (ranks[positive] - rankdata(probabilities[positive])) / zeros
    wins[~positive] = 1 - (ranks[~positive] - rankdata(probabilities[~positive])) / ones
    area = float(wins[positive].mean())
    return area, (wins - area) / np.where(positive, ones, zeros)


def _drop(
    before: float, after: float, influence: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]
) -> dict[str, float]:
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=influence)
    count = len(by_group)
    half = math.inf
    if count > 1:
        spread = math.sqrt(count / (count - 1) * float(by_group @ by_group))
        half = float(student.ppf(0.975, count - 1)) * spread
    drop = before - after
    low, high = max(-1.0, drop - half), min(1.0, drop + half)
    return {"before": before, "after": after, "drop": drop, "low": low, "high": high}
