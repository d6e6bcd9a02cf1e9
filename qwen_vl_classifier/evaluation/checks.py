"""Check that a classifier uses picture and text: how much worse it is with those of another row.

Permutation keeps everything but the connection: each picture still is a picture of this data set (Breiman, 2001,
"Random Forests", section 10). A classifier that is no worse answers from the other half alone, whatever its accuracy.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.evaluation.intervals import paired_metrics
from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities
from qwen_vl_classifier.images.identity import stamp_of
from qwen_vl_classifier.training.splitting import RowNumbers

CHECKS = ("images_permuted", "images_grey", "texts_permuted")

_GREY = (128, 128, 128)
_COMPARED = ("auroc", "accuracy")


@dataclass(frozen=True, slots=True)
class Altered:
    """Rows as a check scores them.

    Attributes:
        rows: Numbers of the rows that the check is about, shape (m,).
        examples: The same rows with another picture or text.
    """

    rows: RowNumbers
    examples: list[Example]


def plan_checks(
    examples: Sequence[Example],
    sizes: Sequence[Sequence[tuple[int, int]]],
    usable: RowNumbers,
    *,
    most_rows: int,
    seed: int = 0,
) -> dict[str, Altered | str]:
    """Choose rows and give them other pictures and texts; no picture is opened.

    Args:
        examples: At least one.
        sizes: Of the pictures of each, as `read_sizes` gives them.
        usable: Numbers of the rows that may be scored, shape (m,).
        most_rows: Rows that are scored again, at most; drawn at random where there are more.
        seed: Of everything that is drawn.

    Returns:
        For each of `CHECKS` the rows to score, or why there are none.
    """
    rng = np.random.default_rng(seed)
    drawn = usable
    if len(usable) > most_rows:
        drawn = np.sort(rng.choice(usable, most_rows, replace=False))
    return {
        "images_permuted": with_other_pictures(examples, drawn, rng),
        "images_grey": with_grey_pictures(examples, sizes, drawn),
        "texts_permuted": with_other_texts(examples, drawn, rng),
    }


def judge_checks(
    planned: Mapping[str, Altered | str],
    after: Mapping[str, Probabilities],
    labels: Labels,
    probabilities: Probabilities,
    groups: RowNumbers,
    *,
    positions: RowNumbers,
    threshold: float,
    resamples: int,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compare the probabilities of altered rows with those of the rows as they are.

    Args:
        planned: As `plan_checks` gave it.
        after: For each check that has rows, their probabilities of class 1; NaN where there is none.
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1, of the examples as they are.
        groups: Shape (n,), numbers of groups.
        positions: Where each of the planned examples is among these n; -1 for those that were left out.
        threshold: Of the classifier.
        resamples: Of the paired bootstrap.
        seed: Of the resamples.

    Returns:
        For each of `CHECKS`: `reason` why it could not be made, or `None`; `rows`; `auroc` and `accuracy`, each with
        `before`, `after`, `drop`, `low` and `high` (the paired 95 % interval of the drop), or `None`; and `free`,
        whether nothing was lost that these rows can show: the interval of AUROC's drop reaches 0 or lies below, or that
        of accuracy's where only one class occurs.
    """
    found = {}
    for name in CHECKS:
        altered = planned[name]
        if isinstance(altered, str):
            found[name] = not_made(altered)
            continue
        kept = np.isfinite(after[name]) & (positions[altered.rows] >= 0)
        rows = positions[altered.rows[kept]]
        if not len(rows):
            found[name] = not_made("all rows have the same picture")
            continue
        found[name] = _compare(
            labels[rows],
            probabilities[rows],
            after[name][kept],
            groups[rows],
            threshold,
            resamples=resamples,
            seed=seed,
        )
    return found


def not_made(reason: str) -> dict[str, Any]:
    """Return the entry of a check that was not made."""
    return {"reason": reason, "rows": 0, "auroc": None, "accuracy": None, "free": None}


def with_other_pictures(examples: Sequence[Example], rows: RowNumbers, rng: np.random.Generator) -> Altered | str:
    """Give each row the pictures of another source, without opening any.

    Rows of one picture get one other picture, so that a check takes no longer than the evaluation. Pictures go to
    rows that had as many, so that a text about two pictures still has two. That a copy of a row's own picture was given
    to it shows when both are decoded: such rows do not count.

    Returns:
        The altered rows, or why there are none.
    """
    chosen = [examples[row] for row in rows]
    digests = [tuple(stamp_of(source) for source in example.images) for example in chosen]
    sources: dict[tuple[bytes, ...], Any] = {}
    for example, digest in zip(chosen, digests, strict=True):
        sources.setdefault(digest, example.image)
    if set(sources) == {()}:
        return "no row has a picture"
    swapped: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}
    for count in sorted({len(digest) for digest in sources} - {0}):
        swapped |= derangement([digest for digest in sources if len(digest) == count], rng)
    kept = [number for number, digest in enumerate(digests) if digest in swapped]
    if not kept:
        return "all rows have the same picture"
    return Altered(
        rows[kept], [replace(chosen[number], image=sources[swapped[digests[number]]], id=None) for number in kept]
    )


def with_grey_pictures(
    examples: Sequence[Example], sizes: Sequence[Sequence[tuple[int, int]]], rows: RowNumbers
) -> Altered | str:
    """Give each row grey pictures of the same sizes; rows without pictures are left out."""
    kept = rows[[bool(examples[row].images) for row in rows]]
    if not len(kept):
        return "no row has a picture"
    plain_pictures: dict[tuple[int, int], Image.Image] = {}

    def grey(size: tuple[int, int]) -> Image.Image:
        return plain_pictures.setdefault(size, Image.new("RGB", size, _GREY))

    return Altered(
        kept,
        [replace(examples[row], image=tuple(grey(size) for size in sizes[row]), id=None) for row in kept],
    )


def with_other_texts(examples: Sequence[Example], rows: RowNumbers, rng: np.random.Generator) -> Altered | str:
    """Give each row the text of another, never its own."""
    swapped = derangement([*dict.fromkeys(examples[row].text for row in rows)], rng)
    if not swapped:
        return "all rows have the same text"
    return Altered(rows, [replace(examples[row], text=swapped[examples[row].text], id=None) for row in rows])


def derangement(items: Sequence[Hashable], rng: np.random.Generator) -> dict[Any, Any]:
    """Give each of some distinct things another one, none its own; empty where there are fewer than two.

    One random cycle through all of them (Sattolo, 1986, "An algorithm to generate a random cyclic permutation").
    """
    if len(items) < 2:
        return {}
    order = rng.permutation(len(items))
    return {items[one]: items[other] for one, other in zip(order, np.roll(order, 1), strict=True)}


def _compare(
    labels: Labels, before: Probabilities, after: Probabilities, groups: RowNumbers, threshold: float, **draws: int
) -> dict[str, Any]:
    metrics = paired_metrics(labels, before, after, (threshold, threshold), groups, **draws)
    found: dict[str, Any] = {"reason": None, "rows": len(labels)}
    for name in _COMPARED:
        pair = metrics[name]
        names = {"before": "a", "after": "b", "drop": "difference", "low": "low", "high": "high"}
        known = pair["difference"] is not None
        found[name] = {name: pair[own] for name, own in names.items()} if known else None
    decisive = found["auroc"] or found["accuracy"]
    found["free"] = decisive["low"] is None or decisive["low"] <= 0
    return found
