"""Check data before measuring with it: rows seen in training, duplicates, contradictions, likely wrong labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities
from qwen_vl_classifier.images.identity import picture_identities
from qwen_vl_classifier.images.look_alikes import near_pairs
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.training.overlap import distinct_pictures, looks_of_pictures, row_hashes

MOST_SHOWN = 100
_FEWEST_OF_A_CLASS = 5


def check_data(
    examples: Sequence[Example],
    labels: Labels,
    probabilities: Probabilities,
    *,
    training: Sequence[Example] | None,
    record: Mapping[str, Any],
    beats_guessing: bool = True,
) -> dict[str, Any]:
    """Look for problems in the data that make an evaluation less reliable than its numbers suggest.

    Args:
        examples: At least one.
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1.
        training: What the classifier was trained on, if it is at hand.
        record: The classifier's record of its training.
        beats_guessing: Whether the classifier is shown to be better than guessing; else it has no say about labels.

    Returns:
        `exact_duplicates`, `pictures_in_training`, `near_duplicates`, `label_conflicts`, `trained_on` and
        `label_issues`; rows are named by number, at most 100 of each kind beside their total.

    Raises:
        ImageError: A picture cannot be opened.
    """
    own = _Side.of(examples)
    known = None if training is None else _Side.of(training)
    return {
        "exact_duplicates": {
            "within": _listed(_repeats(own)),
            "training": known and _listed(_found_in(known.first_by_row, own.hashes)),
        },
        "pictures_in_training": known and _listed(_sharing_pictures(own, known)),
        "near_duplicates": _near_duplicates(own, known),
        "label_conflicts": {
            "within": _listed(_conflicts(own, own)),
            "training": known and _listed(_conflicts(own, known)),
        },
        "trained_on": trained_on(own.hashes, record),
        "label_issues": label_issues(labels, probabilities, beats_guessing=beats_guessing),
    }


@dataclass(frozen=True, slots=True)
class _Side:
    """One data set by content.

    Attributes:
        examples: Its rows.
        hashes: Of pictures and text of each row.
        pictures: Identities of the pictures of each row; empty for text alone.
    """

    examples: Sequence[Example]
    hashes: list[str]
    pictures: list[tuple[bytes, ...]]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Side:
        pictures = picture_identities([example.images for example in examples])
        return cls(examples, row_hashes(examples, pictures), pictures)

    @property
    def first_by_row(self) -> dict[str, int]:
        return {hashed: row for row, hashed in reversed([*enumerate(self.hashes)])}

    @property
    def distinct_pictures(self) -> dict[bytes, tuple[int, ImageSource]]:
        return distinct_pictures(self.examples, self.pictures)


def trained_on(hashes: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Find rows that a classifier was trained on, by the sketch in its record.

    The sketch holds the 64 smallest hashes of the training rows: those found are certain, and they stand for more. If f
    of s hashes are found, about f / s of the training rows are here. A fine-tuned classifier's record holds that of its
    start, whose rows count too.

    Args:
        hashes: Of the rows, as `row_hashes` gives them.
        record: The classifier's record of its training.

    Returns:
        `known`, whether there is a sketch; `total` and `shown`, rows that were certainly trained on; `estimated_share`
        of all rows here that were, `None` without sketch; and `note`, the same in words.
    """
    sketches = [*_sketches(record)]
    if not sketches:
        return {
            "known": False,
            "total": 0,
            "shown": [],
            "estimated_share": None,
            "note": "the classifier's record does not say which rows it was trained on",
        }
    every = {hashed for kept, _ in sketches for hashed in kept}
    rows = [row for row, hashed in enumerate(hashes) if hashed in every]
    here = set(hashes)
    share = 0.0
    for kept, trained in sketches:
        found = len(here.intersection(kept))
        share = max(share, found / len(kept) * max(trained, len(kept)) / len(here), len(rows) / len(hashes))
    share = min(1.0, share)
    note = "none of the rows in the sketch of the training data is here"
    if rows:
        note = f"at least {len(rows)} of {len(hashes)} rows were in the training data, an estimated {share:.0%}"
    return {
        "known": True,
        "total": len(rows),
        "shown": rows[:MOST_SHOWN],
        "estimated_share": share,
        "note": note,
    }


def label_issues(labels: Labels, probabilities: Probabilities, *, beats_guessing: bool = True) -> dict[str, Any]:
    """Find labels that are likely wrong by confident learning (Northcutt, Jiang and Chuang, 2021, arXiv:1911.00068).

    A class's threshold is the mean probability of that class among the rows labelled so. A row counts for the other
    class where it reaches that class's threshold and not its own, or is likelier of the other (section 3.1, equation
    1). Rows are ranked by the probability of their own label (section 3.2, "self-confidence"). The probabilities must
    come from a classifier that was not trained on these rows.

    Args:
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1.
        beats_guessing: As for `check_data`.

    Returns:
        `reason` why it cannot be told, or `None`; `total`; and `shown`: `row`, `label` and `probability`, the likeliest
        first.
    """
    if min(np.bincount(labels, minlength=2)) < _FEWEST_OF_A_CLASS:
        return {"reason": f"fewer than {_FEWEST_OF_A_CLASS} rows of a class", "total": 0, "shown": []}
    if not beats_guessing:
        reason = "the classifier is not shown to be better than guessing, so it cannot tell which labels are wrong"
        return {"reason": reason, "total": 0, "shown": []}
    both = np.stack([1 - probabilities, probabilities], axis=1)
    reaches = both >= [both[labels == label, label].mean() for label in (0, 1)]
    rows = np.arange(len(labels))
    own, other = both[rows, labels], both[rows, 1 - labels]
    suspected = reaches[rows, 1 - labels] & (~reaches[rows, labels] | (other > own))
    found = np.flatnonzero(suspected)
    found = found[np.argsort(own[found], kind="stable")]
    return {
        "reason": None,
        "total": len(found),
        "shown": [
            {"row": int(row), "label": int(labels[row]), "probability": float(probabilities[row])}
            for row in found[:MOST_SHOWN]
        ],
    }


def _sketches(record: Mapping[str, Any]) -> Iterator[tuple[list[str], int]]:
    """Yield the sketch and the number of training rows of a record and of those that it started from."""
    step: Any = record
    while isinstance(step, Mapping):
        kept = step.get("rows_sketch")
        if isinstance(kept, list) and kept:
            counts = [step.get(name) for name in ("training_rows", "held_out_rows", "validation_rows")]
            yield kept, sum(count for count in counts if isinstance(count, int))
        step = step.get("start")


def _listed(entries: Iterable[dict[str, int]]) -> dict[str, Any]:
    """Count entries and keep the first of them."""
    total = 0
    shown = []
    for entry in entries:
        total += 1
        if total <= MOST_SHOWN:
            shown.append(entry)
    return {"total": total, "shown": shown}


def _repeats(side: _Side) -> Iterator[dict[str, int]]:
    firsts = side.first_by_row
    for row, hashed in enumerate(side.hashes):
        if firsts[hashed] != row:
            yield {"row": row, "other": firsts[hashed]}


def _sharing_pictures(side: _Side, reference: _Side) -> Iterator[dict[str, int]]:
    """Yield rows that share a picture with another data set, each with the first such row there."""
    firsts = {one: row for one, (row, _) in reference.distinct_pictures.items()}
    for row, pictures in enumerate(side.pictures):
        others = [firsts[one] for one in pictures if one in firsts]
        if others:
            yield {"row": row, "other": min(others)}


def _found_in(firsts: Mapping[Any, int], keys: Sequence[Any]) -> Iterator[dict[str, int]]:
    for row, key in enumerate(keys):
        if key in firsts:
            yield {"row": row, "other": firsts[key]}


def _conflicts(side: _Side, reference: _Side) -> Iterator[dict[str, int]]:
    """Yield rows whose pictures and text have the other label elsewhere; within one data set, each row that has one."""
    firsts: dict[tuple[str, int], int] = {}
    for row, (hashed, example) in enumerate(zip(reference.hashes, reference.examples, strict=True)):
        if example.label in (0, 1):
            firsts.setdefault((hashed, int(example.label)), row)
    for row, (hashed, example) in enumerate(zip(side.hashes, side.examples, strict=True)):
        label = int(example.label or 0)
        other = firsts.get((hashed, 1 - label))
        if other is not None:
            yield {"row": row, "other": other, "label": label, "other_label": 1 - label}


def _near_duplicates(own: _Side, known: _Side | None) -> dict[str, Any]:
    pictures = own.distinct_pictures
    mine, rows = looks_of_pictures(pictures)
    found: dict[str, Any] = {
        "within": _listed(
            {"row": rows[one], "other": rows[other], "distance": bits} for one, other, bits in near_pairs(mine)
        ),
        "training": None,
        "pictures": len(pictures),
        "compared": len(rows),
    }
    if known is not None:
        # The same pictures are listed as such already.
        theirs, their_rows = looks_of_pictures(
            {one: found for one, found in known.distinct_pictures.items() if one not in pictures}
        )
        found["training"] = _listed(
            {"row": rows[one], "other": their_rows[other], "distance": bits}
            for one, other, bits in near_pairs(mine, theirs)
        )
    return found
