"""The manifest of a folder of scores: everything that the scores depend on, and how two manifests differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.errors import first_of, one_line
from qwen_vl_classifier.scoring.formats import NO_WORDS, Words, columns_of
from qwen_vl_classifier.scoring.scorers.exclusive_classes import ExclusiveClasses

FORMAT_VERSION = 3

_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


@dataclass(frozen=True, slots=True)
class ScoreManifest:
    """Everything that the scores in a folder depend on.

    Attributes:
        classifiers: For each classifier its name, unlike all others, and its fingerprint; in the order of columns.
        data: SHA-256 of the data.
        options: Name and value of each option that decides which rows there are, how they are cut, or what is written.
        format: Of the shards: "parquet", "jsonl" or "csv".
        words: For each classifier what it calls its classes, or `None`; empty where none has words.
        exclusive: Classifiers that are classes of which a row has exactly one.
    """

    classifiers: tuple[tuple[str, str], ...]
    data: str
    options: Mapping[str, Any]
    format: str = "parquet"
    words: Words = NO_WORDS
    exclusive: tuple[ExclusiveClasses, ...] = ()

    @property
    def kept(self) -> Sequence[str]:
        """The columns of the data that the scores repeat."""
        columns: Sequence[str] = self.options.get("columns", ())
        return columns

    @property
    def names(self) -> list[str]:
        """The names of the classifiers; of a single one it does not matter."""
        return [name for name, _ in self.classifiers]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        columns = columns_of("probability", self.names)
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "classifiers": dict(zip(columns, (fingerprint for _, fingerprint in self.classifiers), strict=True)),
            "data": self.data,
            "format": self.format,
            "options": dict(self.options),
        }
        if self.words:
            content["words"] = [own and list(own) for own in self.words]
        if self.exclusive:
            content["exclusive"] = [group.to_json() for group in self.exclusive]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ScoreManifest:
        """Make a manifest from what `to_json` returned."""
        classifiers = [
            (column.removeprefix("probability").removeprefix("_"), fingerprint)
            for column, fingerprint in content["classifiers"].items()
        ]
        return cls(
            tuple(classifiers),
            content["data"],
            content["options"],
            content["format"],
            content.get("words", ()),
            tuple(map(ExclusiveClasses.from_json, content.get("exclusive", ()))),
        )


def differences(kept: Any, given: Any) -> str:
    """Name each fact in which two manifests differ; "" where there is none.

    Args:
        kept: What a folder's manifest holds, which may be anything.
        given: The content of another manifest.
    """
    before, now = _facts(kept), _facts(given)
    different = [
        f"{_shown(name)} was {_shown(before.get(name, 'absent'))}, is now {_shown(now.get(name, 'absent'))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return first_of(different, most=20, separator="; ")


def _shown(text: str) -> str:
    """Write what somebody else's file may say on one line; of a SHA-256 the beginning is enough for people."""
    return one_line(_SHA256.sub(r"\1", text))


def _facts(manifest: Any) -> dict[str, str]:
    """Write what a manifest says as text by name, whatever one that was changed by hand holds."""
    facts: dict[str, str] = {}
    for name, value in manifest.items() if isinstance(manifest, dict) else ():
        if name == "options" and isinstance(value, dict):
            facts |= {option: repr(setting) for option, setting in value.items()}
        elif isinstance(value, dict):  # of classifiers also the order counts: it is that of the columns
            facts[name] = ", ".join(f"{column} by {fingerprint}" for column, fingerprint in value.items())
        else:
            facts[name] = str(value)
    return facts
