"""Which row to ask next: a share at random, from which the head is estimated, and the rows that teach it most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.labelling.live_head import LiveHead
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.training.splitting import RowNumbers

Source = Literal["random", "uncertain", "diverse", "check", "queued", "agreement"]
Mask = npt.NDArray[np.bool_]

_RARE = 5  # labels of a class, below which rows that may be of it come first
_RARE_SHARE = 0.2  # of the labels, below which a class is rare
_LIKELY_SHARE = 0.01  # of the rows, that count as likely to be of a rare class
_ENDS_SHARE = 0.1  # of the rows, that count as likely to be of a class before there is a head
_FEWEST = 10  # rows from which one is taken
_RIDGE = 0.01  # penalty of logistic regression, as `train` chooses it for some hundred rows of standardised features
_RIDGE_ROWS = 10  # fewer labels count as this many for the penalty
_BIAS_RIDGE = 1e-3
_PROVEN = 0.95  # of the log loss of guessing, below which a head is believed
_ROUNDING = 1e-9
_EVEN = 0.25  # variance of a label whose probability is one half


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
        order: Shape (n,): a permutation of the rows of the pool, drawn at random.
    """

    def __init__(self, order: RowNumbers) -> None:
        self._order = order

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
    """Chooses rows to ask.

    Args:
        pool: Features of all rows.
        random_share: Of the questions, from 0 to 1.
        seed: Of the permutation from which the random share is taken.
        order: Shape (n,): that permutation, where it must not change when rows are added to the pool.

    Attributes:
        random: The random share.
    """

    def __init__(
        self,
        pool: PoolFeatures,
        *,
        random_share: float = 0.25,
        seed: int = 0,
        order: npt.NDArray[np.integer] | None = None,
    ) -> None:
        self._pool = pool
        self._share = random_share
        if order is None:
            order = np.random.default_rng(seed).permutation(len(pool))
        self.random = RandomShare(order.astype(np.int64))

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

        The random share is exact in any run of questions: a question is random whenever fewer have been than should.
        All others ask what teaches a head most. With several labels, their heads take turns.

        Args:
            passed: Shape (n,): rows that were answered, skipped or that people were unsure of.
            counts: How many questions there have been from each source, those that are reserved among them; sources
                other than random, uncertain and diverse do not count.
            heads: One for each label; `None` where there is none yet.
            start: Shape (n,), margins of every row from before any label; used where there is no head.
            reserved: Rows that are being asked elsewhere.
            ahead: How many rows to choose; fewer are where the pool ends.
        """
        taken = passed.copy()
        taken[np.fromiter(reserved, dtype=np.int64, count=len(reserved))] = True
        random = counts.get("random", 0)
        total = random + counts.get("uncertain", 0) + counts.get("diverse", 0)
        lessons: dict[int, _Lesson] = {}
        chosen: list[Choice] = []
        while len(chosen) < ahead and not taken.all():
            if random < self._share * (total + 1) - _ROUNDING:
                row = self.random.next(taken)
                assert row is not None
                chosen.append(Choice(row, "random"))
                random += 1
            else:
                turn = total % len(heads) if heads else 0
                head = heads[turn] if heads else None
                if turn not in lessons:
                    lessons[turn] = _Lesson(self._pool, head, np.flatnonzero(taken))
                row = lessons[turn].best(_candidates(self._fresh(taken), head, start, total))
                chosen.append(Choice(row, "diverse" if head is None else "uncertain"))
            for lesson in lessons.values():
                lesson.learn(row)
            taken[row] = True
            total += 1
        return chosen

    def _fresh(self, taken: Mask) -> RowNumbers:
        """Return the rows that may be asked: of groups of which none was asked, where there are such."""
        groups = self._pool.groups
        known = np.zeros(int(groups.max()) + 1, dtype=np.bool_)
        known[groups[taken]] = True
        fresh = np.flatnonzero(~known[groups])
        return fresh if len(fresh) else np.flatnonzero(~taken)


def _candidates(free: RowNumbers, head: LiveHead | None, start: Float | None, total: int) -> RowNumbers:
    """Return the rows to choose from: all, or those likely to be of a class of which few labels are known."""
    if head is None:
        if start is None:
            return free
        return free[_lowest(start[free] if total % 2 else -start[free], _ENDS_SHARE)]
    ones, known = int(head.labels.sum()), len(head.labels)
    rarer = min(ones, known - ones)
    if rarer < min(_RARE, _RARE_SHARE * known):
        return free[_lowest(-head.margins[free] if rarer == ones else head.margins[free], _LIKELY_SHARE)]
    return free


def _lowest(values: Float, share: float) -> RowNumbers:
    number = min(len(values), max(_FEWEST, round(share * len(values))))
    return np.argpartition(values, number - 1)[:number]


class _Lesson:
    """What the label of each row would teach logistic regression, given the rows whose labels are known.

    It is by how much the variance of the log odds falls, in the mean over all rows of the pool (Schein and Ungar, 2007,
    "Active learning for logistic regression: an evaluation", section 4; MacKay, 1992, "Information-based objective
    functions for active data selection"). A row that the head is sure of teaches little, and so does one like those
    that were asked or one unlike all others. Until a head is shown to know something, every row counts as undecided,
    and rows that stand for many others come first.

    Variances are those of a head on a sketch of the features.

    Args:
        pool: Features of all rows.
        head: Of the label; `None` before there is one.
        known: Numbers of the rows whose labels are known or being asked.
    """

    def __init__(self, pool: PoolFeatures, head: LiveHead | None, known: RowNumbers) -> None:
        sketch = pool.sketch(pool.usual if head is None else head.tap)
        self._points, self._moment = sketch.points, sketch.moment
        width = self._points.shape[1]
        known_better = head is not None and head.log_loss < _PROVEN * head.prior_log_loss
        self._undecided = _variances(head.margins) if head and known_better else np.full(len(pool), _EVEN)
        some = self._points[known].astype(np.float64)
        ridge = np.full(width, _RIDGE * max(len(known), _RIDGE_ROWS))
        ridge[-1] = _BIAS_RIDGE
        inverse = np.linalg.inv((some.T * self._undecided[known]) @ some + np.diag(ridge))
        self._inverse = inverse
        reach = self._points @ inverse.astype(np.float32)
        self._own = np.einsum("ij,ij->i", reach, self._points).astype(np.float64)
        self._shared = np.einsum("ij,ij->i", reach @ self._moment.astype(np.float32), reach).astype(np.float64)

    def best(self, rows: RowNumbers) -> int:
        """Return which of some rows teaches most."""
        undecided = self._undecided[rows]
        gain = undecided * self._shared[rows] / (1 + undecided * self._own[rows])
        return int(rows[int(gain.argmax())])

    def learn(self, row: int) -> None:
        """Take the label of a row as known: an update of rank one (Sherman and Morrison, 1950)."""
        away = self._inverse @ self._points[row].astype(np.float64)
        share = self._undecided[row] / (1 + self._undecided[row] * self._own[row])
        across = self._points @ away.astype(np.float32)
        felt = self._points @ (self._inverse @ (self._moment @ away)).astype(np.float32)
        self._own = self._own - share * across**2
        self._shared = self._shared - 2 * share * across * felt + share**2 * (away @ self._moment @ away) * across**2
        self._inverse = self._inverse - share * np.outer(away, away)


def _variances(margins: Float) -> Float:
    """Return the variance of labels of which the log odds are given."""
    variances: Float = np.exp(-np.logaddexp(0.0, margins) - np.logaddexp(0.0, -margins))
    return variances
