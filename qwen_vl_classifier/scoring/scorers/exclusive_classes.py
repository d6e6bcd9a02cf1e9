"""Columns of a panel of which a row has exactly one class: a probability for each class, and the likeliest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExclusiveClasses:
    """A panel of classes of which a row has exactly one, among the classifiers of a folder of scores.

    Attributes:
        name: Ends the names of its two columns; "" where it is the only one that scores.
        first: The number of the classifier of its first class, from 0; those of the others follow.
        classes: What they are called.
        temperature: Of their probabilities, as in `Panel`.
    """

    name: str
    first: int
    classes: tuple[str, ...]
    temperature: float

    @property
    def columns(self) -> tuple[str, str]:
        """The names of the columns for the likeliest class and for its probability."""
        ending = f"_{self.name}" if self.name else ""
        return f"class{ending}", f"class_probability{ending}"

    @property
    def numbers(self) -> range:
        """The numbers of the classifiers of its classes."""
        return range(self.first, self.first + len(self.classes))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ExclusiveClasses:
        """Make it from what `to_json` returned."""
        return cls(record["name"], record["first"], tuple(record["classes"]), record["temperature"])
