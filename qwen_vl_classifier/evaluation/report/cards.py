"""The rows that a page shows as cards: filtered, sorted, enlarged and exported by `gallery.js`, plain without it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_vl_classifier.evaluation.report.pictures import Thumbnails
from qwen_vl_classifier.evaluation.report.words import SHORT, file_name, printable

KINDS = ("mistake", "missed", "false-alarm", "uncertain", "suspect")

MOST_CARDS = 500
"""Rows in a page. Those that an evaluation names first have pictures, see `pictures.py`."""

_NAMED = 48  # of each kind
_CLIPPED = 200  # characters of the text of a card without a picture


def evaluation_cards(evaluation: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """Collect mistakes, the surest first, then the least certain rows and those whose label to check.

    Args:
        evaluation: As `evaluate` returns it.
        thumbnails: Where pictures come from.

    Returns:
        `shown`, cards in the page; `more`, cards that only the script brings in, with shorter texts and no pictures;
        `rows`, for the script, one entry for each card of both; `totals` by tag; and `left_out`, mistakes that are not
        in the page.
    """
    threshold, predictions = evaluation["classifier"]["threshold"], evaluation["predictions"]
    kinds: dict[int, list[str]] = {}
    for row in _surest_mistakes(predictions, threshold):
        kinds[row] = ["mistake", "missed" if predictions[row]["label"] else "false-alarm"]
    for row in evaluation["examples"]["uncertain"][:_NAMED]:
        kinds.setdefault(row, []).append("uncertain")
    for issue in evaluation["data"]["label_issues"]["shown"]:
        kinds.setdefault(issue["row"], []).append("suspect")
    named = {row for rows in evaluation["examples"].values() for row in rows[:_NAMED]}
    kept = _kept(kinds, named, MOST_CARDS - len(named))
    totals = {tag: sum(tag in kinds[row] for row in kept) for tag in KINDS}
    positions = positions_of(evaluation, len(predictions))
    shown: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for with_pictures in (True, False):
        for row in kept:
            if (row in named) is not with_pictures:
                continue
            prediction = predictions[row]
            card = card_of(prediction, thumbnails if with_pictures else None)
            (shown if with_pictures else more).append(card | {"kinds": kinds[row]})
            rows.append(
                {
                    "tags": kinds[row] + [f"slice-{number}" for number in prediction.get("slices", ())],
                    "export": export_of(prediction, positions),
                    "sure": abs(prediction["probability"] - prediction["label"]) if "mistake" in kinds[row] else -1,
                    "probability": prediction["probability"],
                    "row": row,
                }
            )
    counts = evaluation["confusion"]
    wrong = counts["false_positive"] + counts["false_negative"]
    return {"shown": shown, "more": more, "rows": rows, "totals": totals, "left_out": wrong - totals["mistake"]}


def card_of(row: Mapping[str, Any], thumbnails: Thumbnails | None) -> dict[str, Any]:
    """Return what a card shows of a row.

    Args:
        row: As `predictions` of an evaluation or `differing` of a comparison has it.
        thumbnails: Where pictures come from; `None` for a card without pictures and with a shorter text.
    """
    pictures, absent = ([], None) if thumbnails is None else thumbnails.of(row["row"])
    return {
        "row": row["row"],
        "label": row["label"],
        "probability": row.get("probability"),
        "decision": row.get("decision"),
        "text": printable(row["text"]) if thumbnails else printable(row["text"], _CLIPPED),
        "id": None if row["id"] is None else printable(row["id"], SHORT),
        "image": None if row["image"] is None else file_name(row["image"]),
        "pictures": pictures,
        "absent": absent,
    }


def export_of(row: Mapping[str, Any], positions: Sequence[int] | None) -> dict[str, Any]:
    """Return how an exported file names a row: by its id, or by its place in the data where it has none."""
    if row["id"] is not None:
        return {"id": row["id"]}
    return {"row": row["row"] if positions is None else positions[row["row"]]}


def positions_of(measured: Mapping[str, Any], count: int) -> list[int] | None:
    """Return the place of each row among those that were read, or `None` where no row was left out.

    Args:
        measured: An evaluation or a comparison.
        count: How many rows it is about.
    """
    gone = set(measured.get("left_out", {}).get("positions", ()))
    return [place for place in range(count + len(gone)) if place not in gone] if gone else None


def _surest_mistakes(predictions: Sequence[Mapping[str, Any]], threshold: float) -> list[int]:
    probabilities = np.array([row["probability"] for row in predictions])
    labels = np.array([row["label"] for row in predictions])
    wrong = np.flatnonzero((probabilities >= threshold) != (labels == 1))
    order = np.argsort(-np.abs(probabilities - labels)[wrong], kind="stable")
    return [int(row) for row in wrong[order]]


def _kept(kinds: Iterable[int], named: Container[int], room: int) -> list[int]:
    """Return the rows that the evaluation names, and others while there is room, in the order of the page."""
    kept = []
    for row in kinds:
        if row in named:
            kept.append(row)
        elif room > 0:
            kept.append(row)
            room -= 1
    return kept
