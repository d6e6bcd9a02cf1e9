"""Find slices of the data on which a classifier is worse: accuracy by column, picture size and text length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import fisher_exact

from qwen_vl_classifier.config.spelling import did_you_mean
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.metrics import interval_json
from qwen_vl_classifier.training.uncertainty import wilson

PICTURE_SIZE, TEXT_LENGTH = "picture size", "text length"

SIGNIFICANT = 0.05

_MOST_VALUES = 20
_PARTS = 4
_SHOWN_CHARACTERS = 60

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Slicing:
    """Rows cut by one property.

    Attributes:
        name: Of the property.
        parts: Value in words and the rows that have it, shape (n,), for each part.
        note: What was left out, in words, or empty.
    """

    name: str
    parts: list[tuple[str, Mask]]
    note: str = ""


def slicings(
    examples: Sequence[Example],
    columns: Sequence[str],
    *,
    fewest: int,
    sizes: Sequence[Sequence[tuple[int, int]]],
) -> list[Slicing]:
    """Cut rows by columns, by the size of their first picture and by the length of their text.

    A column of numbers with more than 20 different ones, like sizes and lengths, is cut at its quartiles. Of a column
    with more than 20 words, the 20 most frequent are taken. Rows without a value are a part of their own.

    Args:
        examples: At least one.
        columns: Names in `Example.fields`.
        fewest: Parts with fewer rows are left out.
        sizes: Of the pictures of each example, as `read_sizes` gives them.

    Raises:
        DataError: No row has such a column.
    """
    found = [_by_column(examples, name, fewest) for name in columns]
    pixels = [float(math.prod(row[0])) if row else math.nan for row in sizes]
    found.append(_by_number(PICTURE_SIZE, np.array(pixels), fewest, unit="pixels", absent="no picture"))
    lengths = np.array([len(example.text) for example in examples], dtype=np.float64)
    found.append(_by_number(TEXT_LENGTH, lengths, fewest, unit="characters"))
    return [slicing for slicing in found if slicing.parts or slicing.note]


def measure_slices(
    found: Sequence[Slicing], right: Mask, positive: Mask, groups: npt.NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Compare the accuracy of each slice with that of all other rows.

    Where rows share a picture or group, counts are divided by the design effect of the slice (Rao and Scott, 1992, "A
    simple method for the analysis of clustered binary data"): eight rows that are right or wrong together say little
    more than one. Intervals are Wilson's. p-values are those of Fisher's exact test, two-sided, corrected for the
    number of slices that were looked at (Holm, 1979, "A simple sequentially rejective multiple test procedure").

    Args:
        found: The slicings.
        right: Shape (n,): whether the answer is right.
        positive: Shape (n,): whether the label is 1.
        groups: Shape (n,), numbers of groups.

    Returns:
        For each slice, the least accurate first: `name`, `value`, `rows`, `positives`, `accuracy` (value, low, high),
        `rest` (accuracy of all other rows), `p_value` (corrected) and `worse` (whether it is less accurate than the
        rest with a p-value below 0.05).
    """
    made: list[dict[str, Any]] = []
    for slicing in found:
        for value, rows in slicing.parts:
            count, hits, others = int(rows.sum()), int(right[rows].sum()), int((~rows).sum())
            other_hits = int(right[~rows].sum())
            effect = design_effect(right[rows], groups[rows])
            low, high = wilson(hits / effect, count / effect)
            chance = 1.0
            if others:
                other_effect = design_effect(right[~rows], groups[~rows])
                table = [
                    [round(hits / effect), round((count - hits) / effect)],
                    [round(other_hits / other_effect), round((others - other_hits) / other_effect)],
                ]
                chance = float(fisher_exact(table).pvalue)
            made.append(
                {
                    "name": slicing.name,
                    "value": value,
                    "rows": count,
                    "positives": int(positive[rows].sum()),
                    "accuracy": interval_json(hits / count, low, high),
                    "rest": other_hits / others if others else None,
                    "p_value": chance,
                }
            )
    for entry, corrected in zip(made, holm([entry["p_value"] for entry in made]), strict=True):
        entry["p_value"] = corrected
        below = entry["rest"] is not None and entry["accuracy"]["value"] < entry["rest"]
        entry["worse"] = bool(below and corrected < SIGNIFICANT)
    return sorted(made, key=lambda entry: entry["accuracy"]["value"])


def slices_of_rows(found: Sequence[Slicing], measured: Sequence[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Return for each row the numbers of its slices, rising.

    Args:
        found: The slicings.
        measured: What `measure_slices` made of them; slices are numbered in this order.
        count: How many rows there are.
    """
    masks = {(slicing.name, value, int(rows.sum())): rows for slicing in found for value, rows in slicing.parts}
    numbers: list[list[int]] = [[] for _ in range(count)]
    for number, entry in enumerate(measured):
        for row in np.flatnonzero(masks[entry["name"], entry["value"], entry["rows"]]):
            numbers[row].append(number)
    return numbers


def slice_verdict(entry: Mapping[str, Any]) -> str:
    """Return whether a slice is "worse" or "better" than the rest, or "within chance".

    Args:
        entry: As `measure_slices` returns it.
    """
    if entry["rest"] is None or entry["p_value"] >= SIGNIFICANT:
        return "within chance"
    return "worse" if entry["accuracy"]["value"] < entry["rest"] else "better"


def design_effect(right: Mask, groups: npt.NDArray[np.int64]) -> float:
    """Return how many rows carry the information of one independent row: 1 where rows are not grouped.

    Args:
        right: Shape (n,), at least one.
        groups: Shape (n,), numbers of groups.
    """
    share = float(right.mean())
    sizes = np.bincount(groups)
    count = int((sizes > 0).sum())
    if share in (0.0, 1.0) or count < 2:
        # Nothing varies, so nothing can be estimated: take rows of a group as one.
        return len(right) / count
    residuals = np.bincount(groups, weights=right - share)
    by_group = count / (count - 1) * float(residuals @ residuals)
    by_row = len(right) / (len(right) - 1) * share * (1 - share) * len(right)
    return max(1.0, by_group / by_row)


def holm(chances: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that the chance of any false alarm stays below the level."""
    order = np.argsort(chances, kind="stable")
    corrected = np.empty(len(chances))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[index]))
        corrected[index] = highest
    return corrected.tolist()


def _by_column(examples: Sequence[Example], name: str, fewest: int) -> Slicing:
    values = [example.fields.get(name) for example in examples]
    if all(value is None for value in values):
        known = sorted({column for example in examples for column in example.fields})
        raise DataError(
            f"no row has a column {name!r} to slice by; give one of {', '.join(known[:20])}{did_you_mean(name, known)}"
            if known
            else f"no row has a column {name!r} to slice by, nor any other; give data with further columns"
        )
    present = [value for value in values if value is not None]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present)
    if numeric and len(set(present)) > _MOST_VALUES:
        numbers = np.array([float("nan") if value is None else float(value) for value in values])
        return _by_number(name, numbers, fewest, unit="", absent="no value")
    words = ["no value" if value is None else _shorten(str(value)) for value in values]
    counts = Counter(words)
    enough = [word for word, rows in counts.most_common() if rows >= fewest][:_MOST_VALUES]
    note = ""
    if len(enough) < len(counts):
        left = sum(rows for word, rows in counts.items() if word not in enough)
        rows = f"{left} row{'s' if left > 1 else ''}"
        note = (
            f"{name}: {len(counts) - len(enough)} of {len(counts)} values ({rows}) left out: "
            f"a slice takes at least {fewest} rows, and at most {_MOST_VALUES} values are compared"
        )
    every = np.array(words, dtype=object)
    return Slicing(name, [(word, every == word) for word in enough], note)


def _by_number(name: str, numbers: npt.NDArray[np.float64], fewest: int, *, unit: str, absent: str = "none") -> Slicing:
    missing = ~np.isfinite(numbers)
    parts = []
    known = numbers[~missing]
    if len(known) and known.min() < known.max():
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _PARTS + 1), method="nearest"))
        number = np.searchsorted(edges[1:-1], numbers, side="left")
        for part in range(len(edges) - 1):
            rows = (number == part) & ~missing
            if rows.any():
                span = f"{numbers[rows].min():,.6g} to {numbers[rows].max():,.6g} {unit}".strip()
                parts.append((span, rows))
    if missing.any() and not missing.all():
        parts.append((absent, missing))
    return Slicing(name, [(value, rows) for value, rows in parts if rows.sum() >= fewest])


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
