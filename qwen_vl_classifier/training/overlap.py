"""For what a figure stands: which texts and pictures of the rows held out had been trained on, and which were new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_classifier.classifier.calibration import Calibration
from qwen_vl_classifier.classifier.probabilities import Float, logits_of
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.images.identity import looks_of, picture_identities
from qwen_vl_classifier.images.look_alikes import Looks, near_pairs
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.training.probe.candidates import Candidate
from qwen_vl_classifier.training.probe.estimate import held_out_estimate
from qwen_vl_classifier.training.probe.fitting import FeatureRows
from qwen_vl_classifier.training.probe.heads import Standardised, linear_margins, validate_mlp
from qwen_vl_classifier.training.splitting import Folds, classes_of, folds, grouping_of, groups_of, text_key

MANY_TEXTS = 20
"""Distinct texts from which it is worth asking how good answers to new ones are."""

_MOST_PICTURES = 5_000  # whose looks are compared
_NEARLY_ALL, _MOST, _HARDLY_ANY = 0.95, 0.5, 0.05


@dataclass(frozen=True, slots=True)
class Contents:
    """What rows may share.

    Attributes:
        texts: Of each row, without differences of blanks.
        pictures: The identities of each row's pictures.
    """

    texts: list[str]
    pictures: list[tuple[bytes, ...]]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Contents:
        """Read what examples hold; pictures that were encoded are not opened again."""
        return cls(
            [text_key(example.text) for example in examples],
            picture_identities([example.images for example in examples]),
        )

    def followed_by(self, others: Contents) -> Contents:
        """Return the contents of these rows and of others after them."""
        return Contents([*self.texts, *others.texts], [*self.pictures, *others.pictures])

    def counts(self) -> dict[str, int]:
        """Count distinct texts and pictures."""
        return {"texts": len({*self.texts}), "pictures": len({one for row in self.pictures for one in row})}


@dataclass(frozen=True, slots=True)
class Novelty:
    """What is new in rows that were held out.

    Attributes:
        texts: Number of distinct texts among them.
        pictures: Number of distinct pictures among them.
        known_texts: Share of them whose text was trained on.
        known_pictures: Share of those with pictures of which one was trained on.
    """

    texts: int
    pictures: int
    known_texts: float
    known_pictures: float

    @classmethod
    def between(cls, trained_on: Contents, held_out: Contents) -> Novelty:
        """Compare rows held out with those trained on."""
        first = len(trained_on.texts)
        rows, held = np.arange(first), np.arange(first, first + len(held_out.texts))
        return cls.of(trained_on.followed_by(held_out), [(rows, held)])

    @classmethod
    def of(cls, contents: Contents, parts: Folds) -> Novelty:
        """Compare the rows held out of each fold with those trained on."""
        texts, pictures = [], []
        for rows, held in parts:
            known_texts = {contents.texts[row] for row in rows}
            known_pictures = {one for row in rows for one in contents.pictures[row]}
            texts += [contents.texts[row] in known_texts for row in held]
            shown = [contents.pictures[row] for row in held if contents.pictures[row]]
            pictures += [not known_pictures.isdisjoint(row) for row in shown]
        every = [row for _, held in parts for row in held]
        counts = Contents([contents.texts[row] for row in every], [contents.pictures[row] for row in every]).counts()
        return cls(**counts, known_texts=_share(texts), known_pictures=_share(pictures))

    @property
    def many_texts_repeat(self) -> bool:
        """Whether most rows have a text that was trained on, and texts are so many that others may be asked."""
        return self.texts >= MANY_TEXTS and self.known_texts >= _MOST

    def __str__(self) -> str:
        words = [_described(self.pictures, "picture", self.known_pictures)] if self.pictures else []
        return ", ".join([*words, _described(self.texts, "text", self.known_texts)])


@dataclass(frozen=True, slots=True)
class Seen:
    """What distinct pictures of some rows look like: of many, 5,000 of them, spread over the rows.

    Attributes:
        looks: Of each picture.
        groups: The group of the first row that has it.
    """

    looks: Looks
    groups: list[int]

    @classmethod
    def of(cls, examples: Sequence[Example], contents: Contents) -> Seen:
        """Look at pictures; those that were encoded are not opened again."""
        groups = groups_of(examples, pictures=contents.pictures)
        places: dict[bytes, tuple[int, ImageSource]] = {}
        for example, group, identities in zip(examples, groups.tolist(), contents.pictures, strict=True):
            for source, identity in zip(example.images, identities, strict=True):
                places.setdefault(identity, (group, source))
        every = [*places.values()]
        kept = np.linspace(0, len(every) - 1, min(len(every), _MOST_PICTURES)).round().astype(int)
        chosen = [every[place] for place in kept]
        return cls(looks_of([source for _, source in chosen]), [group for group, _ in chosen])

    def alike_pairs(self) -> dict[str, int]:
        """Count pairs in different groups that look alike without being the same.

        Returns:
            `pairs`, and `compared`, the number of pictures.
        """
        pairs = sum(self.groups[one] != self.groups[other] for one, other, _ in near_pairs(self.looks))
        return {"pairs": pairs, "compared": len(self.groups)}


def estimate_on_new_texts(
    best: Candidate,
    calibration: Calibration,
    threshold: float,
    rows: FeatureRows,
    examples: Sequence[Example],
    contents: Contents,
    config: TrainConfig,
) -> dict[str, Any] | None:
    """Estimate how good a chosen head is where texts are new too, by folds that are whole in texts and pictures.

    The head is trained again for these folds, on fewer rows than the one that is kept; tap, kind of head, calibration
    and threshold stay.

    Args:
        best: What was chosen.
        calibration: Of its answers.
        threshold: From which the label is 1.
        rows: All rows.
        examples: What the rows are of.
        contents: What the examples hold.
        config: Options.

    Returns:
        As `held_out_estimate` has it; `None` where such folds cannot be made.
    """
    groups, across = grouping_of(examples, "both", pictures=contents.pictures)
    try:
        parts = folds(classes_of(rows.targets), groups, config.folds, config.seed, across=across)
    except DataError:
        return None
    probability = calibration.apply(logits_of(_margins(best, rows, parts, config)))[:, 1]
    found = held_out_estimate(probability, threshold, rows.targets, rows.weights, groups, seed=config.seed)
    return {**found, "method": "cross-validation", "stands_for": str(Novelty.of(contents, parts))}


def _margins(best: Candidate, rows: FeatureRows, parts: Folds, config: TrainConfig) -> Float:
    if best.head in ("zero-shot", "calibrated"):  # which learn nothing of a text
        return best.margins
    data = Standardised.of(rows.at(best.tap))
    if best.l2 is None:
        return validate_mlp(data, rows.targets, rows.weights, parts, config).margins
    margins: Float = linear_margins(data, rows.targets, rows.weights, parts, [best.l2])[0]
    return margins


def _share(known: Sequence[bool]) -> float:
    return float(np.mean(known)) if known else 0.0


def _described(number: int, what: str, known: float) -> str:
    if known <= _HARDLY_ANY:
        return f"new {what}s"
    if known < _NEARLY_ALL:
        return f"{what}s that {known:.0%} of the rows share with those trained on"
    return f"the same {what}" if number == 1 else f"the same {number:,} {what}s"
