"""How far annotators agree, beyond what they would by chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

_LEVEL = 0.95
_Z = NormalDist().inv_cdf(0.5 + _LEVEL / 2)


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa of two annotators.

    Attributes:
        rows: Questions that both answered.
        value: 1 where they always agree, 0 where they agree as often as by chance.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    rows: int
    value: float
    low: float
    high: float


def cohen_kappa(pairs: Iterable[tuple[Hashable, Hashable]]) -> Kappa | None:
    """Compute Cohen's kappa with its interval.

    With p_ij the fraction of questions to which the first annotator answers i and the second j, kappa is
    (p_o - p_e) / (1 - p_e), where p_o is the sum of p_ii, and p_e that of p_i. p_.i (Cohen, 1960, "A coefficient of
    agreement for nominal scales"). The interval is kappa plus and minus 1.96 standard errors by the large-sample
    formula of Fleiss, Cohen and Everitt (1969, "Large sample standard errors of kappa and weighted kappa"). Where
    annotators always agree, that formula gives no width: the lower end is then what kappa would be if p_o were the
    lower end of its exact (Clopper-Pearson) interval.

    Args:
        pairs: For each question that both answered, the answer of the first and that of the second annotator.

    Returns:
        `None` where kappa is not defined: no questions, or both gave one and the same answer to all.
    """
    answers = list(pairs)
    words = {word: number for number, word in enumerate(dict.fromkeys(word for pair in answers for word in pair))}
    if len(words) < 2:
        return None
    n = len(answers)
    p = np.zeros((len(words), len(words)))
    for first, second in answers:
        p[words[first], words[second]] += 1 / n
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    observed, expected = float(np.trace(p)), float(rows @ columns)
    kappa = (observed - expected) / (1 - expected)
    if math.isclose(observed, 1):
        lowest = ((1 - _LEVEL) / 2) ** (1 / n)
        return Kappa(n, 1.0, max(-1.0, (lowest - expected) / (1 - expected)), 1.0)
    weights = ((1 - observed) * (columns[:, None] + rows[None, :])) ** 2  # of disagreements: p_.i + p_j.
    diagonal = ((1 - expected) - (rows + columns) * (1 - observed)) ** 2
    np.fill_diagonal(weights, diagonal)
    variance = float((p * weights).sum()) - (observed * expected - 2 * expected + observed) ** 2
    width = _Z * math.sqrt(max(variance, 0.0) / n) / (1 - expected) ** 2
    return Kappa(n, kappa, max(-1.0, kappa - width), min(1.0, kappa + width))


def agreement_of(answers: Iterable[Mapping[str, Hashable]], *, ties: int) -> dict[str, Any] | None:
    """Describe how far annotators agree, for the page: the two of them that have most questions in common.

    Args:
        answers: For each question with several answers, the answer of each annotator.
        ties: Questions without a majority.

    Returns:
        `rows`, `annotators`, `kappa` (value and ends of its interval, or `None`) and `ties`; `None` without questions.
    """
    pairs: dict[tuple[str, str], list[tuple[Hashable, Hashable]]] = {}
    for by_name in answers:
        for one, other in itertools.combinations(sorted(by_name), 2):
            pairs.setdefault((one, other), []).append((by_name[one], by_name[other]))
    if not pairs:
        return None
    both = max(sorted(pairs), key=lambda pair: len(pairs[pair]))
    found = cohen_kappa(pairs[both])
    kappa = None if found is None else [found.value, found.low, found.high]
    return {"rows": len(pairs[both]), "annotators": [*both], "kappa": kappa, "ties": ties}
