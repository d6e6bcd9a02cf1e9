"""Taps, which name a layer and a pooling to read, and the spans of tokens that a pooling averages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.config.spelling import did_you_mean
from qwen_vl_classifier.errors import ConfigError

Pooling: TypeAlias = Literal["mean", "image", "text", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

LAST_NORM = -1
"""The layer number of the last decoder layer after the final norm."""

Depth: TypeAlias = tuple[int, bool]
"""Where a tap reads before it pools: its layer, and whether the final norm follows."""

EXPORTABLE_POOLINGS: tuple[Pooling, ...] = ("mean", "last")
"""The poolings that other engines have."""

_NORMED = "normed"


@dataclass(frozen=True, slots=True, order=True)
class Tap:
    """A layer and a pooling: where and how features are read.

    Attributes:
        layer: 1..num_layers is the output of that decoder layer; -1 is the last layer after the final norm.
        pooling: "mean" over every unpadded token, "image" over the image tokens, "text" over the user's own text
            without the template, "last" for the last unpadded token. An empty span pools to zeros.
        normed: Apply the model's final norm to the output of the layer before pooling, as a model that ends with this
            layer does. False for layer -1, which stands after the norm in any case.

    Raises:
        ConfigError: An unknown pooling or an impossible layer.

    Example:
        >>> str(Tap(layer=-1, pooling="mean"))
        'mean:-1'
        >>> Tap.parse("last:24")
        Tap(layer=24, pooling='last', normed=False)
        >>> str(Tap(24, "last", normed=True))
        'last:24:normed'
    """

    layer: int
    pooling: Pooling
    normed: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            hint = did_you_mean(str(self.pooling), POOLINGS)
            raise ConfigError(f"tap pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}{hint}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ConfigError(f"tap layer {self.layer!r}: expected a whole number")
        if self.layer != LAST_NORM and self.layer < 1:
            raise ConfigError(
                f"tap layer {self.layer}: expected 1 or more, or -1 for the last layer after the final norm"
            )
        if not isinstance(self.normed, bool):
            raise ConfigError(f"tap normed {self.normed!r}: expected true or false")
        if self.layer == LAST_NORM and self.normed:
            object.__setattr__(self, "normed", False)

    def __str__(self) -> str:
        return f"{self.pooling}:{self.layer}" + (f":{_NORMED}" if self.normed else "")

    @property
    def depth(self) -> Depth:
        """The layer to read before pooling."""
        return self.layer, self.normed

    @property
    def exportable(self) -> bool:
        """Whether other engines can read here: they pool all tokens or the last one, after the final norm."""
        return self.pooling in EXPORTABLE_POOLINGS and (self.normed or self.layer == LAST_NORM)

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read a tap from its written form, such as "mean:-1" or "last:24:normed".

        Raises:
            ConfigError: The text is not of the form POOLING:LAYER or POOLING:LAYER:normed.
        """
        pooling, *rest = text.split(":")
        normed = rest[1:] == [_NORMED]
        try:
            (layer,) = map(int, rest[:1] if normed else rest)
        except ValueError:
            raise ConfigError(
                f"tap {text!r}: write it as POOLING:LAYER or POOLING:LAYER:normed, such as mean:-1 or mean:24:normed"
            ) from None
        return cls(layer, pooling, normed)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Spans:
    """Which tokens of a row belong to one example, as half-open index ranges.

    Attributes:
        tokens: Every token of the example: its prefix, then its own suffix.
        image: The image tokens, one range for each picture.
        text: The user's text without the template.
    """

    tokens: tuple[tuple[int, int], ...]
    image: tuple[tuple[int, int], ...]
    text: tuple[int, int]

    def of(self, pooling: Pooling) -> tuple[tuple[int, int], ...]:
        """Return the ranges that a pooling averages."""
        if pooling == "mean":
            return self.tokens
        if pooling == "image":
            return self.image
        if pooling == "text":
            return (self.text,)
        end = self.tokens[-1][1]
        return ((end - 1, end),)


def pooling_weights(spans: Iterable[Spans], pooling: Pooling, length: int) -> npt.NDArray[np.float32]:
    """Return a pooling as weights, so that pooling is one matrix product: weights @ hidden states.

    Args:
        spans: The examples of one row.
        pooling: How to pool.
        length: Number of tokens of the row, padding included.

    Returns:
        Shape (examples, length); each line sums to 1, or to 0 where the span is empty.
    """
    lines = []
    for span in spans:
        line = np.zeros(length, dtype=np.float32)
        for start, end in span.of(pooling):
            line[start:end] = 1.0
        total = line.sum()
        lines.append(line / total if total else line)
    return np.stack(lines)
