"""The content of the page of a panel as one JSON-able dictionary; the template lays it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_classifier.evaluation.panels.panel_verdict import check_words
from qwen_vl_classifier.evaluation.report.cards import card_of
from qwen_vl_classifier.evaluation.report.pictures import Thumbnails
from qwen_vl_classifier.evaluation.report.words import (
    DASH,
    SHORT,
    date_of,
    described,
    file_name,
    interval,
    metric_rows,
    metric_writer,
    or_dash,
    printable,
)
from qwen_vl_classifier.evaluation.verdict import percent

MOST_PICTURES = 240
MOST_BYTES = 2_500_000
"""Of all pictures in the page of a panel together."""

_COLUMNS = {
    False: (("accuracy", "Accuracy"), ("f1_1", "F1"), ("auroc", "AUROC")),
    True: (("precision_1", "Precision"), ("recall_1", "Recall"), ("f1_1", "F1"), ("auroc", "AUROC")),
}
"""Columns with bars, of labels for themselves and of classes."""

_FIGURES = (
    *("accuracy", "balanced_accuracy", "precision_1", "recall_1", "f1_1", "auroc", "average_precision"),
    *("log_loss", "ece"),
)
_OF_CLASSES = ("precision_1", "recall_1", "f1_1", "auroc", "average_precision", "ece")
_MOST_CLASSES = 30  # in the confusion matrix of a page
_SHADES = 5
_MOST_WRONG = 8  # cards of a label
_MOST_CARDS = 200  # of all labels
_MOST_PAIRS = 12
_PAIR_PICTURES = 3
_SKILLS = {
    "answers": {"kind": "good", "text": "better than guessing"},
    "ranking": {"kind": "open", "text": "ranks better than chance"},
    "none": {"kind": "bad", "text": "not shown to be better than guessing"},
    None: {"kind": "open", "text": "no row has it"},
}


def summarise_panel(evaluation: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """Summarise the evaluation of a panel for a reader.

    Args:
        evaluation: As `evaluate_panel` returns it.
        thumbnails: Where the pictures of rows come from.

    Returns:
        All that the page shows, numbers written out; texts as in a report.
    """
    about = evaluation["measured"]
    texts = {row["text"] for row in evaluation["predictions"]}
    shared = printable(next(iter(texts))) if len(texts) == 1 else None
    confusion = _confusion(evaluation) if evaluation["one_of"] else None
    pairs = _pairs(evaluation, thumbnails) if evaluation["one_of"] else []
    columns = _columns(evaluation)
    return {
        "panel": file_name(about["panel"]) if about.get("panel") else None,
        "data": file_name(about["data"]) if about.get("data") else None,
        "date": date_of(about["date"]) if about.get("date") else None,
        "badges": _badges(evaluation),
        "sentence": printable(evaluation["sentence"]),
        "notes": [printable(note) for note in evaluation["notes"]],
        "tiles": _tiles(evaluation),
        "rows": evaluation["rows"],
        "one_of": evaluation["one_of"] is not None,
        "text": shared,
        "columns": columns,
        "labels": _labels(evaluation, thumbnails, columns, cards_have_texts=shared is None),
        "macro": _macro(evaluation, columns),
        "confusion": confusion,
        "pairs": pairs,
        "looks": _looks(evaluation["checks"]),
        "setup": described({key: value for key, value in evaluation["panel"].items() if key != "labels"}),
        "made_of": [
            {"name": printable(label["name"], SHORT), "tap": label["tap"], "head": label["head"]}
            | {"threshold": f"{label['threshold']:.3f}", "abstains": _band(label["abstention"])}
            for label in evaluation["panel"]["labels"]
        ],
    }


def _badges(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    badges = []
    if evaluation["checks"]["images_permuted"]["free"]:
        badges.append({"kind": "bad", "text": "Not shown to use the pictures"})
    if seen := evaluation["trained_on"]["total"]:
        rows_seen = "1 row" if seen == 1 else f"{seen:,} rows"
        badges.append({"kind": "bad", "text": f"At least {rows_seen} from its own training data"})
    if evaluation["one_of"]:
        skill = _SKILLS[evaluation["one_of"]["skill"]]
        return [*badges, {"kind": skill["kind"], "text": skill["text"].capitalize()}]
    skills = [label["skill"] for label in evaluation["labels"] if label["skill"]]
    better = sum(skill != "none" for skill in skills)
    kind = "good" if better == len(skills) else "open" if better else "bad"
    text = f"{better:,} of {len(skills):,} labels better than guessing"
    if len(skills) == 1:
        text = "Better than guessing" if better else "Not shown to be better than guessing"
    return [*badges, {"kind": kind, "text": text}]


def _tiles(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    macro, guesses = evaluation["macro"]["metrics"], evaluation["macro"]["baselines"]["majority"]
    if found := evaluation["one_of"]:
        majority = found["baselines"]["majority"]
        return [
            _tile("Right class", percent, found["metrics"]["accuracy"]),
            {
                "title": "Right by guessing",
                "value": percent(majority["accuracy"]),
                "note": f"always “{printable(majority['class'], SHORT)}”",
            },
            _tile("Macro-F1", "{:.3f}".format, macro["f1_1"]),
            _tile("Macro-AUROC", "{:.3f}".format, macro["auroc"]),
            _tile("Calibration error", "{:.3f}".format, found["metrics"]["ece"]),
        ]
    tiles = [
        _tile("Right answers, mean of labels", percent, macro["accuracy"]),
        {
            "title": "Right by guessing",
            "value": or_dash(percent, guesses["accuracy"]),
            "note": "always each label's more frequent answer",
        },
        _tile("Macro-F1", "{:.3f}".format, macro["f1_1"]),
        _tile("Macro-AUROC", "{:.3f}".format, macro["auroc"]),
    ]
    exact = evaluation["exact_match"]
    if exact["value"] is not None and len(evaluation["labels"]) > 1:
        note = f"of {exact['count']:,} rows; by guessing {percent(exact['majority'])}"
        tiles.append({"title": "All labels right", "value": percent(exact["value"]), "note": note})
    return tiles


def _tile(title: str, write: Any, found: Mapping[str, Any]) -> dict[str, str]:
    between = interval(write, found["low"], found["high"])
    return {"title": title, "value": or_dash(write, found["value"]), "note": f"95 % interval {between}"}


def _columns(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the columns with bars: `key`, `title`, and the ends of their axis, `low` and `high`."""
    found = []
    for key, title in _COLUMNS[evaluation["one_of"] is not None]:
        entries = [label["metrics"][key] for label in evaluation["labels"]]
        lows = [entry["low"] for entry in entries if entry["low"] is not None]
        lows += [guess for label in evaluation["labels"] if (guess := _guess(label, key)) is not None]
        low = math.floor(10 * min(lows, default=0.0)) / 10 if lows else 0.0
        low = min(max(low, 0.0), 0.9)
        found.append({"key": key, "title": title, "low": low, "ends": f"{low:.1f} to 1"})
    return found


def _guess(label: Mapping[str, Any], key: str) -> float | None:
    """Return what guessing gets, where a bar marks it."""
    guesses = {"accuracy": label["baselines"]["majority"]["accuracy"], "auroc": 0.5}
    return guesses.get(key) if label["metrics"][key]["value"] is not None else None


def _bars(
    metrics: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], guess: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Return value, interval and places on the axis, from 0 to 100, for each column."""
    bars = []
    for column in columns:
        entry, write = metrics[column["key"]], metric_writer(column["key"])
        known = entry["low"] is not None

        def place(value: float, low: float = column["low"]) -> float:
            return round(100 * min(max((value - low) / (1 - low), 0.0), 1.0), 1)

        at = guess.get(column["key"])
        bars.append(
            {
                "title": column["title"],
                "value": or_dash(write, entry["value"]),
                "interval": interval(write, entry["low"], entry["high"]),
                "plot": {
                    "low": place(entry["low"]),
                    "wide": round(place(entry["high"]) - place(entry["low"]), 1),
                    "at": place(entry["value"]),
                    "guess": None if at is None else place(at),
                }
                if known
                else None,
            }
        )
    return bars


def _macro(evaluation: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    macro = evaluation["macro"]
    guess = {"accuracy": macro["baselines"]["majority"]["accuracy"], "auroc": 0.5}
    return {"bars": _bars(macro["metrics"], columns, guess), "ece": _plain(macro["metrics"]["ece"])}


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    write = "{:.3f}".format
    return {
        "value": or_dash(write, entry["value"]),
        "interval": interval(write, entry["low"], entry["high"]),
    }


def _labels(
    evaluation: Mapping[str, Any],
    thumbnails: Thumbnails,
    columns: Sequence[Mapping[str, Any]],
    *,
    cards_have_texts: bool,
) -> list[dict[str, Any]]:
    one_of = evaluation["one_of"] is not None
    found = []
    for label in evaluation["labels"]:
        rows, counts = label["rows"], label["confusion"]
        guess = {key: _guess(label, key) for key in ("accuracy", "auroc")}
        keys = _OF_CLASSES if one_of else _FIGURES
        figures = {key: label["metrics"][key] for key in keys}
        sort = {key: label["metrics"][key]["value"] for key in (*(column["key"] for column in columns), "ece")}
        found.append(
            {
                "sort": {"rows": rows["positives"]} | sort,
                "name": printable(label["name"], SHORT),
                "labelled": rows["labelled"],
                "positives": rows["positives"],
                "rate": percent(rows["positives"] / rows["labelled"]) if rows["labelled"] else DASH,
                "bars": _bars(label["metrics"], columns, guess),
                "ece": _plain(label["metrics"]["ece"]),
                "skill": _SKILLS[label["skill"]],
                "threshold": None if label["threshold"] is None else f"{label['threshold']:.3f}",
                "missed": counts["false_negative"],
                "alarms": counts["false_positive"],
                "metrics": metric_rows(figures, label["baselines"]) if rows["labelled"] else [],
                "reliability": label["reliability"],
                "suspects": label["examples"]["mislabelled"],
                "cards": [],
            }
        )
    each = max(1, min(_MOST_WRONG, _MOST_CARDS // len(found)))
    for turn in range(each):  # so that a full page has some pictures of every label
        for column, (label, entry) in enumerate(zip(evaluation["labels"], found, strict=True)):
            if turn < len(label["examples"]["wrong"]):
                row = evaluation["predictions"][label["examples"]["wrong"][turn]]
                entry["cards"].append(_wrong(row, evaluation, column, thumbnails, with_text=cards_have_texts))
    return found


def _wrong(
    row: Mapping[str, Any], evaluation: Mapping[str, Any], column: int, thumbnails: Thumbnails, *, with_text: bool
) -> dict[str, Any]:
    probability = row["probabilities"][column]
    if evaluation["one_of"]:
        label, answer = row["label"], row["answer"]
        known = {"label": printable(label, SHORT), "answer": printable(answer, SHORT), "decision": None}
    else:
        decision = row["decisions"][column]
        known = {"label": ("no", "yes")[row["labels"][column]], "decision": decision}
        known["answer"] = "none (abstains)" if decision == "abstain" else decision
    card = card_of({**row, "label": known["label"]}, thumbnails)
    return card | known | {"probability": f"{probability:.3f}", "text": card["text"] if with_text else None}


def _confusion(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the confusion matrix for a page; of many classes those with most mistakes, all others as one."""
    table, names = evaluation["one_of"]["confusion"], [label["name"] for label in evaluation["labels"]]
    count = len(names)
    kept = list(range(count))
    if count > _MOST_CLASSES:
        mistakes = [
            sum(table[one][other] + table[other][one] for other in range(count) if other != one) for one in range(count)
        ]
        kept = sorted(sorted(range(count), key=lambda one: -mistakes[one])[: _MOST_CLASSES - 1])
    groups = [[one] for one in kept]
    if rest := [one for one in range(count) if one not in kept]:
        groups.append(rest)
    titles = [printable(names[one], SHORT) for one in kept]
    titles += [f"{len(rest):,} other classes"] if rest else []
    lines = []
    for place, group in enumerate(groups):
        counts = [sum(table[one][other] for one in group for other in others) for others in groups]
        total = sum(counts)
        cells = [
            {
                "count": f"{number:,}",
                "share": percent(number / total) if number else "",
                "shade": math.ceil(_SHADES * math.sqrt(number / total)) if number else 0,
                "right": column == place,
            }
            for column, number in enumerate(counts)
        ]
        lines.append({"name": titles[place], "total": f"{total:,}", "cells": cells})
    return {"names": titles, "lines": lines, "shares": len(groups) <= 12, "merged": len(rest)}


def _pairs(evaluation: Mapping[str, Any], thumbnails: Thumbnails) -> list[dict[str, Any]]:
    pairs = []
    for pair in evaluation["one_of"]["confused"][:_MOST_PAIRS]:
        rows = [evaluation["predictions"][row] for row in pair["rows"][:_PAIR_PICTURES]]
        cards = [card_of({**row, "label": row["label"]}, thumbnails) for row in rows]
        pairs.append(
            {
                "label": printable(pair["label"], SHORT),
                "answer": printable(pair["answer"], SHORT),
                "count": f"{pair['count']:,} {'row' if pair['count'] == 1 else 'rows'}",
                "share": percent(pair["share"]),
                "cards": cards,
            }
        )
    return pairs


def _looks(checks: Mapping[str, Any]) -> list[str]:
    """Say what happens with pictures and texts of other rows."""
    words = {
        "images_permuted": ("With the pictures of other rows", "picture"),
        "images_grey": ("With grey pictures", "picture"),
        "texts_permuted": ("With the texts of other rows", "text"),
    }
    lines = []
    for name, (title, what) in words.items():
        check = checks[name]
        if check["reason"] is not None:
            lines.append(f"{title}: not measured ({check['reason']}).")
            continue
        verdict = "it is not shown to get worse" if check["free"] else "it gets worse"
        free = [one["name"] for one in check["labels"] if one["low"] <= 0]
        line = f"{title}, {verdict}: mean {check_words(check, what, grey=name == 'images_grey')}."
        if free and not check["free"]:
            listed = ", ".join(printable(one, SHORT) for one in free[:5])
            more = f" and {len(free) - 5:,} more" if len(free) > 5 else ""
            line += f" No loss is shown for: {listed}{more}."
        lines.append(line)
    return lines


def _band(band: Sequence[float] | None) -> str:
    return "never" if band is None else "from {:.3f} to {:.3f}".format(*band)
