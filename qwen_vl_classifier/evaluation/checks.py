"""Does it look at the picture, does it read the text: what is lost when either is not the row's own.

Permutation keeps everything but the connection: each picture still is a picture of this data set (Breiman, 2001,
"Random Forests", section 10). A classifier that loses nothing answers from the other half alone, whatever its accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.identity import picture_identities
from qwen_vl_classifier.data.images import image_size
from qwen_vl_classifier.evaluation.intervals import bootstrap, bounds
from qwen_vl_classifier.evaluation.metrics import Labels, Measure, Probabilities, compute_metrics, plain
from qwen_vl_classifier.features.store import FeatureStore

CHECKS = ("images_permuted", "images_grey", "texts_permuted")

_GREY = (128, 128, 128)
_COMPARED = ("auroc", "accuracy")

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Altered:
    """Rows as a check scores them.

    Attributes:
        rows: Numbers of the rows that the check is about, shape (m,).
        examples: The same rows with another picture or text.
    """

    rows: Rows
    examples: list[Example]


def run_checks(
    classifier: Classifier,
    examples: Sequence[Example],
    labels: Labels,
    probabilities: Probabilities,
    groups: Rows,
    *,
    most_rows: int,
    resamples: int,
    seed: int = 0,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score rows again without their own picture or text and compare.

    Args:
        classifier: What to check.
        examples: At least one.
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1, of the examples as they are.
        groups: Shape (n,), numbers of groups.
        most_rows: Rows that are scored again, at most; drawn at random where there are more.
        resamples: Of the paired bootstrap.
        seed: Of everything that is drawn.
        store: Where features are kept, those of altered rows too.
        progress: Show a progress bar.

    Returns:
        For each of `CHECKS`: `reason` why it could not be made, or `None`; `rows`; `auroc` and `accuracy`, each with
        `before`, `after`, `drop`, `low` and `high` (the paired 95 % interval of the drop), or `None`; and `free`,
        whether nothing was lost that these rows can show: the interval of AUROC's drop reaches 0 or lies below, or that
        of accuracy's where only one class occurs.

    Raises:
        ImageError: A picture cannot be opened.
    """
    rng = np.random.default_rng(seed)
    drawn = np.arange(len(examples))
    if len(examples) > most_rows:
        drawn = np.sort(rng.choice(len(examples), most_rows, replace=False))
    makers: dict[str, Callable[[], Altered | str]] = {
        "images_permuted": lambda: with_other_pictures(examples, drawn, rng),
        "images_grey": lambda: with_grey_pictures(examples, drawn),
        "texts_permuted": lambda: with_other_texts(examples, drawn, rng),
    }
    found = {}
    for name in CHECKS:
        altered = makers[name]()
        if isinstance(altered, str):
            found[name] = not_made(altered)
            continue
        after = classifier.predict_proba(altered.examples, store=store, progress=progress)[:, 1]
        rows = altered.rows
        found[name] = _compare(
            labels[rows], probabilities[rows], after, groups[rows], classifier.threshold, resamples, seed
        )
    return found


def not_made(reason: str) -> dict[str, Any]:
    """Return the entry of a check that was not made."""
    return {"reason": reason, "rows": 0, "auroc": None, "accuracy": None, "free": None}


def with_other_pictures(examples: Sequence[Example], rows: Rows, rng: np.random.Generator) -> Altered | str:
    """Give each row the pictures of another, never the same ones.

    Rows of one picture get one other picture, so that a check takes no longer than the evaluation. Pictures go to
    rows that had as many, so that a text about two pictures still has two.

    Returns:
        The altered rows, or why there are none.
    """
    chosen = [examples[row] for row in rows]
    digests = picture_identities(chosen)
    sources: dict[tuple[bytes, ...], Any] = {}
    for example, digest in zip(chosen, digests, strict=True):
        sources.setdefault(digest, example.image)
    if set(sources) == {()}:
        return "no row has a picture"
    swapped: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}
    for count in sorted({len(digest) for digest in sources} - {0}):
        swapped |= derangement([digest for digest in sources if len(digest) == count], rng)
    kept = [place for place, digest in enumerate(digests) if digest in swapped]
    if not kept:
        return "all rows have the same picture"
    return Altered(
        rows[kept], [replace(chosen[place], image=sources[swapped[digests[place]]], id=None) for place in kept]
    )


def with_grey_pictures(examples: Sequence[Example], rows: Rows) -> Altered | str:
    """Give each row grey pictures of the same sizes; rows without pictures are left out."""
    kept = rows[[bool(examples[row].images) for row in rows]]
    if not len(kept):
        return "no row has a picture"
    plain_pictures: dict[tuple[int, int], Image.Image] = {}

    def grey(size: tuple[int, int]) -> Image.Image:
        return plain_pictures.setdefault(size, Image.new("RGB", size, _GREY))

    return Altered(
        kept,
        [
            replace(examples[row], image=tuple(grey(image_size(source)) for source in examples[row].images), id=None)
            for row in kept
        ],
    )


def with_other_texts(examples: Sequence[Example], rows: Rows, rng: np.random.Generator) -> Altered | str:
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
    labels: Labels,
    before: Probabilities,
    after: Probabilities,
    groups: Rows,
    threshold: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    first, second = bootstrap(
        [Measure(labels, before, threshold), Measure(labels, after, threshold)],
        groups,
        resamples=resamples,
        seed=seed,
    )
    values = [compute_metrics(labels, side, threshold) for side in (before, after)]
    found: dict[str, Any] = {"reason": None, "rows": len(labels)}
    for name in _COMPARED:
        own, other = values[0][name], values[1][name]
        if own is None or other is None:
            found[name] = None
            continue
        low, high = bounds(first[name] - second[name])
        found[name] = {"before": own, "after": other, "drop": own - other, "low": plain(low), "high": plain(high)}
    telling = found["auroc"] or found["accuracy"]
    found["free"] = telling["low"] is None or telling["low"] <= 0
    return found
