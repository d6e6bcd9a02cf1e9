"""The input of a classifier, and its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from qwen_vl_classifier.images.source import ImageSource

_LONGEST_SHARED = 10_000  # characters

Decision: TypeAlias = Literal["yes", "no", "abstain"]


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """One row: picture(s) and text, with a label where it is known.

    Attributes:
        image: One picture, several in reading order, or `None` for text alone.
        text: The words that go with it: a claim, a question, a rule.
        label: 0, 1, or `None` where unknown; for training also a soft label, the probability of class 1.
        id: A name that is unique in its data set, or `None`.
        fields: Further columns of the row (group, kind, ...), for slices and grouped splits.
        origin: Where it stands in its data set, for messages, such as "line 7"; `None` for examples made in Python.
        label_text: What its data set calls the label, where that is a word such as "pneumonia"; classifiers take the
            names of their classes from it.

    Example:
        >>> Example("photo.jpg", "The photo shows a red bicycle.", label=1).images
        ('photo.jpg',)
    """

    image: ImageSource | Sequence[ImageSource] | None
    text: str
    label: float | int | None = None
    id: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    origin: str | None = field(default=None, repr=False, compare=False)
    label_text: str | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        several = isinstance(self.image, (list, tuple))
        image = f"[{', '.join(map(_described, self.images))}]" if several else _described(self.image)
        return f"Example(image={image}, text={self.text!r}, label={self.label!r}, id={self.id!r})"

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The pictures as a tuple, empty for text alone."""
        if self.image is None:
            return ()
        if isinstance(self.image, (list, tuple)):
            return tuple(self.image)
        return (self.image,)  # type: ignore[return-value]  # any other sequence is bytes or str: one image


def shared_text(examples: Iterable[Example]) -> str | None:
    """Return the text of all examples if it is one and the same, such as the question about every photo of a folder.

    `None` where texts differ, there are no examples, or the text has more than 10,000 characters.

    Example:
        >>> shared_text([Example("a.jpg", "It is a cat."), Example("b.jpg", "It is a cat.")])
        'It is a cat.'
    """
    texts = {example.text for example in examples}
    return texts.pop() if len(texts) == 1 and len(next(iter(texts))) <= _LONGEST_SHARED else None


def _described(image: object) -> str:
    """Describe a picture without its bytes, which may be many."""
    return f"<{len(image):,} bytes>" if isinstance(image, bytes) else repr(image)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer of a classifier for one example.

    Attributes:
        label: The class, 0 or 1: 1 where `probability` reaches the classifier's threshold.
        probability: Calibrated probability of class 1, between 0 and 1.
        decision: "yes" or "no" as `label` says, or "abstain" inside the abstention band.
        label_name: What the classifier calls the class.
    """

    label: int
    probability: float
    decision: Decision
    label_name: str = ""


@dataclass(frozen=True, slots=True)
class PanelPrediction:
    """The answers of a panel for one example.

    Attributes:
        labels: The answer for each label, by its name. Where a row has exactly one of several classes, `probability`
            is that of `Panel.predict_proba`, the decision is "yes" for the likeliest class and "no" for all others.
        label_name: The likeliest class, where a row has exactly one of several; else `None`.
        probability: Of that class; else `None`.
    """

    labels: dict[str, Prediction]
    label_name: str | None = None
    probability: float | None = None
