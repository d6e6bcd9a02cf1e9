"""Which row to ask next: some at random for the estimate, some that the head is unsure of, some unlike all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.labelling.live_head import LiveHead
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.training.splitting import RowNumbers

Source = Literal["random", "uncertain", "diverse", "check", "queued", "agreement"]
Mask = npt.NDArray[np.bool_]

_DIVERSE_SHARE = 1 / 3  # of the questions that are not random
_NEAREST_SHARE = 0.2  # of the rows, that count as uncertain
_RARE = 5  # labels of a class, below which rows that may be of it come first
_LIKELY_SHARE = 0.01  # of the rows, that count as likely to be of a rare class
_FEWEST = 10  # rows from which the farthest is taken
_CENTRES = 64  # centres whose distances to all rows are in memory at once


@dataclass(frozen=True, slots=True)
class Choice:
    """A row to ask.

    Attributes:
        row: Its number in the pool.
        source: How it was chosen.
    """

    row: int
    source: Source


class RandomShare:
    """The rows from which the estimate is made: the beginning of one permutation of the pool.

    A question of the random share asks the first row of the permutation that has not been asked. Other questions ask
    rows that the permutation would have reached later; once it gets there, they count too, whoever chose them. So the
    rows that count are those before the first row that was not asked: a random sample of the pool, whatever active
    choice does. (Given what was chosen actively, it is inverse sampling, and leaving out the row that ends it makes the
    mean unbiased: Haldane, 1945, "On a method of estimating frequencies".)

    Rows that were skipped or that people are unsure of are passed, but have no label: what is estimated holds for rows
    that a person can answer.

    Args:
        rows: Number of rows of the pool.
        seed: Of the permutation.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self._order = np.random.default_rng(seed).permutation(rows)

    def next(self, taken: Mask) -> int | None:
        """Return the first row of the permutation that is not taken, `None` where all are.

        Args:
            taken: Shape (n,): rows that were answered, skipped or are being asked.
        """
        free = ~taken[self._order]
        return int(self._order[int(free.argmax())]) if free.any() else None

    def counted(self, passed: Mask) -> Mask:
        """Return which rows are a random sample of the pool, shape (n,).

        Args:
            passed: Shape (n,): rows that were answered, skipped or that people were unsure of.
        """
        left = ~passed[self._order]
        end = int(left.argmax()) if left.any() else len(left)
        counts = np.zeros(len(passed), dtype=np.bool_)
        counts[self._order[:end]] = True
        return counts


class Chooser:
    """Chooses rows to ask, and keeps what makes that fast: distances to what has been asked.

    What it keeps never changes an answer. Use one from one thread at a time.

    Args:
        pool: Features of all rows.
        random_share: Of the questions, from 0 to 1.
        seed: Of the random share.

    Attributes:
        random: The random share.
    """

    def __init__(self, pool: PoolFeatures, *, random_share: float = 0.25, seed: int = 0) -> None:
        self._pool = pool
        active = 1 - random_share
        self._shares: dict[Source, float] = {
            "random": random_share,
            "uncertain": active * (1 - _DIVERSE_SHARE),
            "diverse": active * _DIVERSE_SHARE,
        }
        self._spreads: dict[Tap, _Spread] = {}
        self.random = RandomShare(len(pool), seed)

    def choose(
        self,
        passed: Mask,
        counts: Mapping[str, int],
        *,
        heads: Sequence[LiveHead | None] = (),
        start: Float | None = None,
        reserved: Collection[int] = (),
        ahead: int = 1,
    ) -> list[Choice]:
        """Choose the next row and some to follow.

        Sources take turns so that each has its share in any run of questions: the next one is that which lags behind
        most. With several labels, their heads take turns in saying what is uncertain.

        Args:
            passed: Shape (n,): rows that were answered, skipped or that people were unsure of.
            counts: How many questions there have been from each source, those that are reserved among them.
            heads: One for each label; `None` where there is none yet.
            start: Shape (n,), margins of every row from before any label; used where there is no head.
            reserved: Rows that are being asked elsewhere.
            ahead: How many rows to choose; fewer are where the pool ends.
        """
        taken = passed.copy()
        taken[np.fromiter(reserved, dtype=np.int64, count=len(reserved))] = True
        so_far = {source: counts.get(source, 0) for source in self._shares}
        chosen: list[Choice] = []
        while len(chosen) < ahead and not taken.all():
            total = sum(so_far.values())
            source = max(self._shares, key=lambda one: self._shares[one] * (total + 1) - so_far[one])
            head = heads[total % len(heads)] if heads else None
            choice = self._one(source, taken, head, start)
            so_far[source] += 1
            taken[choice.row] = True
            chosen.append(choice)
        return chosen

    def _one(self, source: Source, taken: Mask, head: LiveHead | None, start: Float | None) -> Choice:
        if source == "random":
            row = self.random.next(taken)
            assert row is not None
            return Choice(row, "random")
        spread = self._spread(self._pool.distinct[-1] if head is None else head.tap, taken)
        free = self._fresh(taken)
        margins = start if head is None else head.margins
        if source == "diverse" or margins is None:
            return Choice(spread.farthest(free), "diverse")
        return Choice(spread.farthest(_uncertain(margins, free, head)), "uncertain")

    def _spread(self, tap: Tap, taken: Mask) -> _Spread:
        if tap not in self._spreads:
            self._spreads[tap] = _Spread(self._pool.sketch(tap))
        spread = self._spreads[tap]
        spread.move(np.flatnonzero(taken))
        return spread

    def _fresh(self, taken: Mask) -> RowNumbers:
        """Return the rows that may be asked: of groups of which none was asked, where there are such."""
        groups = self._pool.groups
        known = np.zeros(int(groups.max()) + 1, dtype=np.bool_)
        known[groups[taken]] = True
        fresh = np.flatnonzero(~known[groups])
        return fresh if len(fresh) else np.flatnonzero(~taken)


def _uncertain(margins: Float, free: RowNumbers, head: LiveHead | None) -> RowNumbers:
    """Return the rows that a head can learn most from: nearest to the threshold, or likely to be of a rare class."""
    own = margins[free]
    if head is None:  # nothing says where the threshold of these margins is
        own = own - np.median(own)
    else:
        ones = int(head.labels.sum())
        rarer = min(ones, len(head.labels) - ones)
        if rarer < _RARE and len(head.labels) >= 4 * rarer:
            return free[_lowest(-own if 2 * ones < len(head.labels) else own, _LIKELY_SHARE)]
    return free[_lowest(np.abs(own), _NEAREST_SHARE)]


def _lowest(values: Float, share: float) -> RowNumbers:
    number = min(len(values), max(_FEWEST, round(share * len(values))))
    return np.argpartition(values, number - 1)[:number]


class _Spread:
    """How far every row is from the nearest of some centres, kept up to date as centres come and go.

    Args:
        points: float32, shape (n, numbers).
    """

    def __init__(self, points: npt.NDArray[np.float32]) -> None:
        self._points = points
        self._squares = np.einsum("ij,ij->i", points, points)
        self._nearest = np.full(len(points), -1)
        self._distances = np.full(len(points), np.inf, dtype=np.float32)
        self._centres = np.zeros(0, dtype=np.int64)

    def move(self, centres: RowNumbers) -> None:
        """Set the centres: a centre more costs one pass over the rows, and one less about as much."""
        gone = np.setdiff1d(self._centres, centres, assume_unique=True)
        new = np.setdiff1d(centres, self._centres, assume_unique=True)
        if len(gone):
            orphans = np.flatnonzero(np.isin(self._nearest, gone))
            self._distances[orphans] = np.inf
            self._nearest[orphans] = -1
            self._approach(orphans, np.setdiff1d(centres, new, assume_unique=True))
        self._approach(slice(None), new)
        self._centres = centres

    def farthest(self, rows: RowNumbers) -> int:
        """Return which of some rows is farthest from all centres: the next of greedy k-centre.

        (Gonzalez, 1985, "Clustering to minimize the maximum intercluster distance"; Sener and Savarese, 2018, "Active
        learning for convolutional neural networks: a core-set approach", arXiv:1708.00489.) Without centres, the one
        nearest to the mean.
        """
        if not len(self._centres):
            middle = self._points.mean(axis=0)
            return int(rows[int(((self._points[rows] - middle) ** 2).sum(axis=1).argmin())])
        return int(rows[int(self._distances[rows].argmax())])

    def _approach(self, rows: RowNumbers | slice, centres: RowNumbers) -> None:
        points, squares = self._points[rows], self._squares[rows]
        distances, nearest = self._distances[rows], self._nearest[rows]
        for start in range(0, len(centres), _CENTRES):
            some = centres[start : start + _CENTRES]
            products = points @ self._points[some].T
            found = squares[:, None] + self._squares[some] - 2 * products
            first = found.argmin(axis=1)
            least = found[np.arange(len(found)), first]
            closer = least < distances
            distances[closer] = least[closer]
            nearest[closer] = some[first[closer]]
        self._distances[rows], self._nearest[rows] = distances, nearest
