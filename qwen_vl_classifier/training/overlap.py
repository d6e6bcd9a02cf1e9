"""What two sets of rows have in common: texts, pictures, pictures that look alike, and whole rows.

So it can be said for which rows a figure stands, and whether a classifier was trained on rows that are to be tested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.images.identity import looks_of, picture_identities
from qwen_vl_classifier.images.look_alikes import Looks, near_pairs
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.training.splitting import Folds, text_key

MANY_TEXTS = 20
"""Distinct texts from which it is worth estimating how good answers to new ones are."""

MOST_PICTURES = 5_000
"""Distinct pictures of a data set that are searched for pictures that look alike: each must be decoded."""

SKETCH_ROWS = 64

_HASH_BYTES = 8
_NEARLY_ALL, _MOST, _HARDLY_ANY = 0.95, 0.5, 0.05


@dataclass(frozen=True, slots=True)
class Contents:
    """Texts and pictures of rows, by which they are compared.

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
        both = Contents([*trained_on.texts, *held_out.texts], [*trained_on.pictures, *held_out.pictures])
        return cls.of(both, [(rows, held)])

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
        return cls(**counts, known_texts=_fraction(texts), known_pictures=_fraction(pictures))

    @property
    def many_texts_repeat(self) -> bool:
        """Whether most rows have a text that was trained on, of texts so varied that new ones are to be expected."""
        return self.texts >= MANY_TEXTS and self.known_texts >= _MOST

    def __str__(self) -> str:
        words = [_described(self.pictures, "picture", self.known_pictures)] if self.pictures else []
        return ", ".join([*words, _described(self.texts, "text", self.known_texts)])


def distinct_pictures(
    examples: Sequence[Example], pictures: Sequence[Sequence[bytes]]
) -> dict[bytes, tuple[int, ImageSource]]:
    """Return each picture by its identity: the first row that has it, and where it comes from.

    Args:
        examples: Any.
        pictures: The identities of each example's pictures.
    """
    found: dict[bytes, tuple[int, ImageSource]] = {}
    for row, (example, identities) in enumerate(zip(examples, pictures, strict=True)):
        for source, identity in zip(example.images, identities, strict=True):
            found.setdefault(identity, (row, source))
    return found


def looks_of_pictures(distinct: Mapping[bytes, tuple[int, ImageSource]]) -> tuple[Looks, list[int]]:
    """Return what distinct pictures look like, and their rows: of many, 5,000 of them, spread over the rows.

    Pictures that were encoded are not opened again.
    """
    every = [*distinct.values()]
    kept = np.linspace(0, len(every) - 1, min(len(every), MOST_PICTURES)).round().astype(int)
    chosen = [every[number] for number in kept]
    return looks_of([source for _, source in chosen]), [row for row, _ in chosen]


def alike_pairs(looks: Looks, groups: Sequence[int]) -> dict[str, int]:
    """Count pairs of pictures in different groups that look alike without being the same.

    Args:
        looks: Of distinct pictures.
        groups: The group of the first row that has each.

    Returns:
        `pairs`, and `compared`, the number of pictures.
    """
    pairs = sum(groups[one] != groups[other] for one, other, _ in near_pairs(looks))
    return {"pairs": pairs, "compared": len(groups)}


def sketch(hashes: Sequence[str]) -> list[str]:
    """Return the smallest hashes of rows, rising, at most 64: small enough to keep in the record of a classifier.

    They are a fixed fraction of all possible rows, whichever data set these are in (Broder, 1997, "On the resemblance
    and containment of documents"). Of rows that are tested, those whose hash is in the sketch were trained on; if a
    fraction f of the training rows is among them, about f of the sketch is found.

    Args:
        hashes: As `row_hashes` returns them.
    """
    return sorted(set(hashes))[:SKETCH_ROWS]


def may_have_seen(record: Mapping[str, Any], examples: Sequence[Example]) -> bool:
    """Tell whether some of the examples were trained on, by the sketch in the record of a classifier's training.

    Raises:
        ImageError: A picture cannot be opened.
    """
    known = set(record.get("rows_sketch") or ())
    return bool(known) and not known.isdisjoint(row_hashes(examples))


def row_hashes(examples: Sequence[Example], pictures: Sequence[Sequence[bytes]] | None = None) -> list[str]:
    """Hash text and pictures of each example, not its label or id: 16 hexadecimal digits.

    Args:
        examples: Any.
        pictures: The identities of each example's pictures, where they are known.

    Raises:
        ImageError: A picture cannot be opened.
    """
    pictures = picture_identities([example.images for example in examples]) if pictures is None else pictures
    return [_row_hash(example.text, known) for example, known in zip(examples, pictures, strict=True)]


def _row_hash(text: str, pictures: Sequence[bytes]) -> str:
    # Half of a surrogate pair cannot be written as UTF-8, and a text from Python may hold one.
    hashed = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return hashlib.sha256(hashed + b"".join(pictures)).hexdigest()[: 2 * _HASH_BYTES]


def _fraction(known: Sequence[bool]) -> float:
    return float(np.mean(known)) if known else 0.0


def _described(number: int, what: str, known: float) -> str:
    if known <= _HARDLY_ANY:
        return f"new {what}s"
    if known < _NEARLY_ALL:
        return f"{what}s that {known:.0%} of the rows share with those trained on"
    return f"the same {what}" if number == 1 else f"the same {number:,} {what}s"
