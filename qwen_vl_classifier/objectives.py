"""Objectives, for which a threshold is chosen: the values of `--objective`. Quick to import."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwen_vl_classifier.errors import ConfigError

OBJECTIVES = "accuracy, f1, balanced, recall>=R, precision>=P or cost=FN:FP"
"""The grammar, for help and messages: R and P are shares, FN and FP what a miss and a false alarm cost."""

ObjectiveKind: TypeAlias = Literal["accuracy", "f1", "balanced", "recall", "precision", "cost"]

_WORDS: tuple[ObjectiveKind, ...] = ("accuracy", "f1", "balanced")
_NUMBER = r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)"
_AT_LEAST = re.compile(rf"(recall|precision)>={_NUMBER}")
_COST = re.compile(rf"cost={_NUMBER}:{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Objective:
    """What a threshold is chosen to optimise.

    Attributes:
        kind: The word it begins with.
        least: Of "recall" and "precision": the share to reach, above 0, at most 1.
        miss: Of "cost": what it costs to answer 0 where 1 is right.
        false_alarm: Of "cost": what it costs to answer 1 where 0 is right.

    Example:
        >>> Objective.parse("cost=5:1")
        Objective(kind='cost', least=0.0, miss=5.0, false_alarm=1.0)
    """

    kind: ObjectiveKind
    least: float = 0.0
    miss: float = 1.0
    false_alarm: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read an objective; spaces do not matter.

        Raises:
            ConfigError: It is none of `OBJECTIVES`, or a number is out of its range.
        """
        plain = "".join(text.split())
        for word in _WORDS:
            if plain == word:
                return cls(word)
        if found := _AT_LEAST.fullmatch(plain):
            word, least = ("recall" if found[1] == "recall" else "precision"), float(found[2])
            if not 0 < least <= 1:
                raise ConfigError(f"objective {text[:80]!r}: give a share above 0, at most 1, such as {word}>=0.9")
            return cls(word, least)
        if found := _COST.fullmatch(plain):
            miss, false_alarm = float(found[1]), float(found[2])
            if not (0 < miss < math.inf and 0 < false_alarm < math.inf):
                raise ConfigError(f"objective {text[:80]!r}: give two costs above 0, such as cost=5:1")
            return cls("cost", 0.0, miss, false_alarm)
        raise ConfigError(f"objective {text[:80]!r}: give {OBJECTIVES}, such as recall>=0.9 or cost=5:1")

    def __str__(self) -> str:
        if self.kind == "cost":
            return f"cost={self.miss:.15g}:{self.false_alarm:.15g}"
        return f"{self.kind}>={self.least:.15g}" if self.least else self.kind
