"""Declare options, and check values in the ways that several configurations share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from qwen_vl_classifier.config.spelling import did_you_mean, named, spelled
from qwen_vl_classifier.errors import ConfigError

MAX_ERRORS_HELP = (
    "leave out rows that cannot be used, at most this many: a number, or a percentage such as 5%% "
    "(default: stop at the first)"
)

MAX_TEXT_CHARS = 1_000_000
"""Longest text of a row of a data set, in characters, where the user sets no other limit. Models read far fewer."""

DEVICES = "auto, cpu, cuda, cuda:N, mps, xpu, xpu:N or spread"
"""Names of devices, for messages and help."""

MODEL_HELP = "folder of the backbone, if it was moved after training"
TEXT_TOKENS_HELP = "longest text; longer ones are refused (default: the longest that the model reads)"
GREY_BITS_HELP = (
    "how to read 16-bit grey pictures with no value above 4095: as 12-bit, or as dark 16-bit; 0 refuses them"
)
FEATURES_HELP = "keep features here, to compute them only once"
URL_HOSTS_HELP = (
    "hosts from which pictures may be downloaded, such as example.com, or .example.com for all below it (default: none)"
)
"""The help of options that several verbs have."""


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    kind: Callable[[str], Any] | None = None,
    metavar: str = "",
    section: str = "",
    also: str = "",
    rare: bool = False,
) -> Any:
    """Declare one option of a configuration.

    Args:
        default: Its value where none is given; its type is the type of the flag.
        help: One line of help, in lower case, with the unit.
        choices: The values that are allowed, if few.
        kind: The type of the flag, where the default does not tell it.
        metavar: What stands for the value in the help: the unit of a number. Empty takes the last word of the name.
        section: Heading in the help of all options, where it is not that of the whole configuration.
        also: A second flag for it, such as the one that other verbs have.
        rare: Whether few runs set it, so that `--help` leaves it to `--help-all`.
    """
    given = {"help": help, "choices": choices, "kind": kind, "metavar": metavar, "section": section}
    return field(default=default, metadata={**given, "also": also, "rare": rare})


def split_list(text: str) -> tuple[str, ...]:
    """Return the parts of an option that is a list with commas: without blanks around them, each once.

    Example:
        >>> split_list("mean:-1, last:24,")
        ('mean:-1', 'last:24')
    """
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def is_number(value: object, low: float, high: float) -> bool:
    """Tell whether a value that was read from a file is a number within bounds; `True` and `False` are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def without_effect(config: Any, because: str, *names: str) -> list[str]:
    """Return a sentence for each option that differs from its default and has no effect.

    Args:
        config: The configuration.
        because: What takes the effect away, such as "with method full".
        names: The options that have none then.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    return [
        f"{spelled(name, getattr(config, name))} has no effect {because}"
        for name in names
        if getattr(config, name) != defaults[name]
    ]


def group_by_option(what: str, *, rare: bool = True) -> Any:
    """Declare the option that says which rows belong to one group.

    Args:
        what: What is done with groups, for the help.
        rare: As in `option`.
    """
    return option(
        "image",
        f"{what}: those with the same image (or the same value in a column named group), the same text, both, or the "
        "same value in the column of this name",
        metavar="COLUMN",
        rare=rare,
    )


def check_choices(config: Any) -> None:
    """Refuse a value that is not among the choices of its option."""
    for item in dataclasses.fields(config):
        value, choices = getattr(config, item.name), item.metadata.get("choices")
        if choices and value not in choices:
            known = [str(choice) for choice in choices]
            raise ConfigError(
                f"{named(item.name)} {value!r}: give one of {', '.join(known)}{did_you_mean(str(value), known)}"
            )


def check_positive(config: Any, *names: str) -> None:
    """Refuse an option that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{named(name)} {getattr(config, name)}: give a number above 0")


def check_not_negative(config: Any, *names: str) -> None:
    """Refuse an option below 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{named(name)} {getattr(config, name)}: give 0 or more")


def check_share(config: Any, *names: str, allow_zero: bool = False) -> None:
    """Refuse an option that is not a fraction below 1."""
    for name in names:
        value = getattr(config, name)
        if not (0 < value < 1 or (allow_zero and value == 0)):
            raise ConfigError(
                f"{named(name)} {value}: give a fraction {'from' if allow_zero else 'above'} 0 to below 1"
            )


def most_errors(max_errors: str | int, rows: int, *, empty: float = 0) -> float:
    """Return how many rows of a data set may have errors.

    Args:
        max_errors: A number of rows, or a percentage of them such as "5%".
        rows: How many there are.
        empty: What an empty text means.
    """
    text = str(max_errors).strip()
    if not text:
        return empty
    number, percent, rest = text.partition("%")
    try:
        most = float(number) if percent else int(number)
    except ValueError:
        most = -1
    if rest or not 0 <= most < math.inf or (percent and most > 100):
        raise ConfigError(f"{named('max_errors')} {text!r}: give a number of rows, or a percentage from 0% to 100%")
    return most / 100 * rows if percent else most


def class_weight_of(value: str | Mapping[int, float] | None) -> str | dict[int, float] | None:
    """Bring the weights of the classes to one form: `None`, "balanced" or the weight of each class."""
    if value is None or value in ("none", "balanced"):
        return "balanced" if value == "balanced" else None
    try:
        pairs = [part.split(":") for part in value.split(",")] if isinstance(value, str) else [*value.items()]
        weights = {int(label): float(weight) for label, weight in pairs}
    except (AttributeError, TypeError, ValueError):
        weights = {}
    if weights.keys() != {0, 1} or not all(0 < weight < math.inf for weight in weights.values()):
        raise ConfigError(
            f"{named('class_weight')} {value!r}: give none, balanced, or a weight above 0 for each class: 0:1,1:5"
        )
    return weights
