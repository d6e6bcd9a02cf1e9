"""The content of the page of a comparison as one JSON-able dictionary; the template lays it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vl_classifier.evaluation.report.cards import MOST_CARDS, card_of, export_of, positions_of
from qwen_vl_classifier.evaluation.report.pictures import Thumbnails
from qwen_vl_classifier.evaluation.report.words import (
    SHORT,
    class_names,
    date_of,
    described,
    file_name,
    interval,
    metric_name,
    metric_writer,
    or_dash,
    printable,
    ticks,
)
from qwen_vl_classifier.evaluation.verdict import percent

_WITH_PICTURES = 48
_SHOWN = ("accuracy", "balanced_accuracy", "auroc", "log_loss")


def summarise_comparison(comparison: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """Summarise a comparison for a reader.

    Args:
        comparison: As `compare` returns it.
        thumbnails: Where the pictures of rows come from.

    Returns:
        All that the page shows, numbers written out; texts as in a report.
    """
    about = comparison.get("measured") or {}
    classifiers = comparison["classifiers"]
    return {
        "data": file_name(about["data"]) if about.get("data") else None,
        "date": date_of(about["date"]) if about.get("date") else None,
        "badges": _badges(comparison),
        "sentence": printable(comparison["sentence"]),
        "notes": [printable(note) for note in comparison["notes"]],
        "rows": comparison["rows"],
        "names": class_names(comparison["label_names"]),
        "columns": [_heading(name) for name in _SHOWN],
        "ranking": [_ranked(classifiers[index]) for index in comparison["ranking"]],
        "majority": {name: or_dash(metric_writer(name), comparison["baselines"]["majority"][name]) for name in _SHOWN},
        "plot": _plot(comparison),
        "metrics": [_metric(name, comparison) for name in classifiers[0]["metrics"]],
        "pairs": [_pair(pair, comparison) for pair in comparison["pairs"]],
        "corrected": comparison["correction"]["method"],
        "cards": _cards(comparison, thumbnails),
        "setup": [{"title": _title(one), "lines": described(_made_of(one))} for one in classifiers],
    }


def _title(classifier: Mapping[str, Any]) -> dict[str, str]:
    return {"mark": classifier["mark"], "name": printable(classifier["name"], SHORT)}


def _made_of(classifier: Mapping[str, Any]) -> dict[str, Any]:
    shown_elsewhere = ("mark", "name", "rank", "metrics", "confusion", "folder")
    return {name: value for name, value in classifier.items() if name not in shown_elsewhere}


def _badges(comparison: Mapping[str, Any]) -> list[dict[str, str]]:
    """Say whether one is shown to be better than every other, and whether the best is better than guessing."""
    best = comparison["ranking"][0]
    classifier = comparison["classifiers"][best]
    beaten = [pair["metrics"]["accuracy"]["better"] == "a" for pair in comparison["pairs"] if pair["a"] == best]
    badges = []
    if classifier["metrics"]["accuracy"]["low"] <= comparison["baselines"]["majority"]["accuracy"]:
        badges.append({"kind": "bad", "text": "None is shown to be better than guessing"})
    if all(beaten):
        badges.append({"kind": "good", "text": f"Shown to be the best: {printable(classifier['name'], SHORT)}"})
    else:
        badges.append({"kind": "open", "text": "None is shown to be the best"})
    return badges


def _heading(name: str) -> dict[str, Any]:
    title, of = metric_name(name)
    return {"title": title, "of": of}


def _ranked(classifier: Mapping[str, Any]) -> dict[str, Any]:
    counts = classifier["confusion"]
    return _title(classifier) | {
        "rank": classifier["rank"],
        "values": [_value(name, classifier["metrics"][name]) for name in _SHOWN],
        "missed": f"{counts['false_negative']:,}",
        "alarms": f"{counts['false_positive']:,}",
    }


def _value(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    write = metric_writer(name)
    return {"value": or_dash(write, found["value"]), "interval": interval(write, found["low"], found["high"])}


def _metric(name: str, comparison: Mapping[str, Any]) -> dict[str, Any]:
    return _heading(name) | {
        "values": [_value(name, comparison["classifiers"][index]["metrics"][name]) for index in comparison["ranking"]]
    }


def _pair(pair: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, Any]:
    a, b = (comparison["classifiers"][pair[side]]["mark"] for side in ("a", "b"))
    test, better = pair["mcnemar"], {"a": a, "b": b}
    return {
        "a": a,
        "b": b,
        "only_a": f"{test['only_a']:,}",
        "only_b": f"{test['only_b']:,}",
        "p_value": f"{test['p_corrected']:.2g}",
        "differences": [
            _heading(name) | _difference(name, entry) | {"better": better.get(entry["better"]), "key": name}
            for name, entry in pair["metrics"].items()
        ],
    }


def _difference(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """Write a difference of shares in percentage points, any other with three decimals."""

    def write(value: float) -> str:
        if metric_writer(name) is percent:
            return f"{100 * value:+.1f}".replace("-", "−")
        return f"{value:+.3f}".replace("-", "−")

    unit = " points" if metric_writer(name) is percent else ""
    value = or_dash(write, entry["difference"])
    return {"value": value + unit if entry["difference"] is not None else value} | {
        "interval": interval(write, entry["low"], entry["high"])
    }


def _plot(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracies as places on one axis, shares of its length, with its ticks."""
    entries = [comparison["classifiers"][index] for index in comparison["ranking"]]
    found = [entry["metrics"]["accuracy"] for entry in entries]
    guess: float = comparison["baselines"]["majority"]["accuracy"]
    low: float = min([guess, *(one["low"] for one in found)])
    high: float = max([guess, *(one["high"] for one in found)])
    low, high = max(0.0, low - 0.02), min(1.0, high + 0.02)

    def place(value: float) -> float:
        return (value - low) / (high - low)

    return {
        "ticks": ticks(low, high),
        "guess": place(guess),
        "dots": [
            {"mark": entry["mark"], "value": place(one["value"]), "low": place(one["low"]), "high": place(one["high"])}
            for entry, one in zip(entries, found, strict=True)
        ],
    }


def _cards(comparison: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """Collect the rows on which answers differ, as `evaluation_cards` does."""
    differing = comparison["differing"]
    titles = [_title(one) for one in comparison["classifiers"]]
    positions = positions_of(comparison, comparison["rows"]["total"])
    cards, rows = [], []
    for place, row in enumerate(differing[:MOST_CARDS]):
        correct = [label == row["label"] for label in row["labels"]]
        answers = zip(titles, row["probabilities"], row["labels"], row["decisions"], correct, strict=True)
        cards.append(
            card_of(row, thumbnails if place < _WITH_PICTURES else None)
            | {
                "answers": [
                    title | {"probability": probability, "label": label, "decision": decision, "correct": right}
                    for title, probability, label, decision, right in answers
                ]
            }
        )
        rows.append(
            {
                "tags": [f"label-{row['label']}"]
                + [f"{'correct' if right else 'wrong'}-{number}" for number, right in enumerate(correct)],
                "export": export_of(row, positions),
                "spread": max(row["probabilities"]) - min(row["probabilities"]),
                "row": row["row"],
            }
        )
    return {
        "shown": cards[:_WITH_PICTURES],
        "more": cards[_WITH_PICTURES:],
        "rows": rows,
        "total": len(differing),
        "titles": titles,
    }
