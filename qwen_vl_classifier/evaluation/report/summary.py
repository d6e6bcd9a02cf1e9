"""What a report says, as one JSON-able dictionary; how it looks is the template's business."""

from __future__ import annotations

import unicodedata
from typing import Any

from qwen_vl_classifier.evaluation.report.findings import data_findings, look_sentences
from qwen_vl_classifier.evaluation.report.pictures import Thumbnails
from qwen_vl_classifier.evaluation.slices import slice_verdict
from qwen_vl_classifier.evaluation.verdict import percent

_SHOWN_ROWS = 20
_SHOWN_SLICES = 30
_SHOWN_CHARACTERS = 600
_SHORT = 80  # names: of classes, slices, rows and files
_DASH = "—"

_METRICS = {
    "accuracy": ("Accuracy", "share of examples on the right side of the threshold"),
    "balanced_accuracy": ("Balanced accuracy", "mean of both recalls: 50 % is guessing, however unequal the classes"),
    "precision_1": ("Precision of class 1", "of the examples called class 1, how many are"),
    "recall_1": ("Recall of class 1", "of the examples of class 1, how many are found"),
    "f1_1": ("F1 of class 1", "harmonic mean of precision and recall"),
    "precision_0": ("Precision of class 0", "of the examples called class 0, how many are"),
    "recall_0": ("Recall of class 0", "of the examples of class 0, how many are found"),
    "f1_0": ("F1 of class 0", "harmonic mean of precision and recall"),
    "mcc": ("MCC", "correlation of answer and label; 0 is guessing, 1 is perfect"),
    "auroc": ("AUROC", "chance that an example of class 1 scores above one of class 0; 0.5 is guessing"),
    "average_precision": ("Average precision", "mean precision over all recalls of class 1"),
    "log_loss": ("Log loss", "of the probabilities, lower is better; 0.693 is always saying 0.5"),
    "brier": ("Brier score", "mean squared error of the probabilities, lower is better"),
    "ece": ("Calibration error", "how far probabilities are from what came true (ECE), lower is better"),
}
_HEADLINES = ("accuracy", "balanced_accuracy", "f1_1", "auroc", "log_loss", "ece")
_PERCENTAGES = {name for name in _METRICS if name.startswith(("accuracy", "balanced", "precision", "recall"))}

_GALLERIES = {
    "wrong": (
        "Wrong answers, the surest first",
        "The mistakes furthest on the wrong side; look for wrong labels here too.",
    ),
    "uncertain": ("Least certain", "The examples nearest to the threshold, right or wrong."),
    "mislabelled": (
        "Labels to check",
        "Labels that the other rows speak against (confident learning). The classifier may be what is wrong.",
    ),
}


def summarise(evaluation: dict[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """Summarise an evaluation for a reader.

    Args:
        evaluation: As `evaluate` returns it.
        thumbnails: Where the pictures of examples come from.

    Returns:
        All that the page shows, in its order, numbers written out. Texts are as they came, but cut where they are very
        long, and with a sign in place of control characters.
    """
    table = evaluation["thresholds"]
    threshold = evaluation["classifier"]["threshold"]
    stored = min(range(len(table)), key=lambda place: abs(table[place]["threshold"] - threshold))
    now = table[stored]
    curves, counts = evaluation["curves"], evaluation["confusion"]
    totals = {  # not only of the rows that are named
        "wrong": counts["false_positive"] + counts["false_negative"],
        "uncertain": evaluation["rows"]["total"],
        "mislabelled": evaluation["data"]["label_issues"]["total"],
    }
    metrics = metric_rows(evaluation["metrics"], evaluation["baselines"])
    return {
        "sentence": printable(evaluation["sentence"]),
        "rows": evaluation["rows"],
        "names": [printable(name, _SHORT) for name in evaluation["classifier"]["label_names"]],
        "headlines": [row for row in metrics if row["key"] in _HEADLINES],
        "metrics": [row for row in metrics if row["key"] not in _HEADLINES],
        "looks": look_sentences(evaluation["checks"]),
        "thresholds": {"table": table, "stored": stored},
        "now": {**now, **_follow(now)},
        "prevalence": evaluation["rows"]["positives"] / evaluation["rows"]["total"],
        "curves": curves,
        "risk_caption": _risk_caption(curves["risk_coverage"]["stored"]),
        "most_risk": _round_up(max(curves["risk_coverage"]["risk"])),
        "most_cost": _round_up(max(max(curves["cost"][name]) for name in ("trivial", "calibrated"))),
        "slices": [_slice(entry) for entry in evaluation["slices"][:_SHOWN_SLICES]],
        "notes": [printable(note) for note in evaluation["notes"]],
        "galleries": [
            _gallery(name, evaluation["examples"][name], totals[name], evaluation["predictions"], thumbnails)
            for name in _GALLERIES
        ],
        "findings": data_findings(evaluation["data"]),
        "setup": _setup(evaluation["classifier"]),
    }


def printable(text: Any, most: int = _SHOWN_CHARACTERS) -> str:
    """Make a text fit to be shown: cut where it is very long, control characters as a sign.

    Letters that turn the direction of writing stay: they are part of a text, and the page isolates each text.
    """
    text = str(text)
    text = text if len(text) <= most else text[:most] + " …"
    return "".join(
        "\ufffd" if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" else sign for sign in text
    )


def metric_rows(metrics: dict[str, Any], baselines: dict[str, Any]) -> list[dict[str, str]]:
    """Write out each metric with `key`, `name`, `why`, `value`, `interval`, `majority` and `prior`."""
    rows = []
    for key, found in metrics.items():
        name, why = _METRICS[key]
        write = percent if key in _PERCENTAGES else "{:.3f}".format
        rows.append(
            {
                "key": key,
                "name": name,
                "why": why,
                "value": _or_dash(write, found["value"]),
                "interval": _interval(write, found["low"], found["high"]),
                "majority": _or_dash(write, baselines["majority"][key]),
                "prior": _or_dash(write, baselines["prior"][key]),
            }
        )
    return rows


def _follow(now: dict[str, Any]) -> dict[str, str]:
    """Write out what follows from the counts at one threshold, as tuner.js does for the others."""
    tp, fp, fn, tn = (now[name] for name in ("tp", "fp", "fn", "tn"))
    shares = {
        "accuracy": (tp + tn, tp + fp + fn + tn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
    }
    written = {name: percent(part / whole) if whole else _DASH for name, (part, whole) in shares.items()}
    f1 = f"{2 * tp / (2 * tp + fp + fn):.3f}" if tp + fp + fn else _DASH
    return {**written, "f1": f1, "cost": f"{fp + fn:,}"}


def _risk_caption(stored: dict[str, Any] | None) -> str:
    caption = "How many answers are wrong if only the surest are given."
    if stored is None:
        return f"{caption} This classifier always answers: it has no abstention band."
    low, high = stored["band"]
    caption += f" Its own band, {low:.3f} to {high:.3f}, answers {percent(stored['coverage'])} of the examples"
    return f"{caption}; the dot." if stored["risk"] is not None else f"{caption}."


def _slice(entry: dict[str, Any]) -> dict[str, str]:
    return {
        "name": printable(entry["name"], _SHORT),
        "value": printable(entry["value"], _SHORT),
        "rows": f"{entry['rows']:,}",
        "accuracy": percent(entry["accuracy"]["value"]),
        "interval": _interval(percent, entry["accuracy"]["low"], entry["accuracy"]["high"]),
        "rest": _or_dash(percent, entry["rest"]),
        "worse": entry["worse"],
        "verdict": f"{slice_verdict(entry)}, p = {entry['p_value']:.2g}",
    }


def _gallery(
    name: str, numbers: list[int], total: int, predictions: list[dict[str, Any]], thumbnails: Thumbnails
) -> dict[str, Any]:
    title, note = _GALLERIES[name]
    rows = []
    for number in numbers[:_SHOWN_ROWS]:
        row = predictions[number]
        pictures, absent = thumbnails.of(number)
        rows.append(
            {
                **row,
                "text": printable(row["text"]),
                "id": None if row["id"] is None else printable(row["id"], _SHORT),
                "image": None if row["image"] is None else printable(_file_name(row["image"]), _SHORT),
                "pictures": pictures,
                "absent": absent,
            }
        )
    count = f"{total:,}" if len(rows) == total else f"{len(rows)} of {total:,}"
    return {"title": title, "note": note, "count": count if rows else "none", "rows": rows}


def _file_name(path: str) -> str:
    """Return the last part of a path: the rest says more of its owner's machine than a reader needs."""
    return path.replace("\\", "/").rpartition("/")[2]


def _or_dash(write: Any, value: float | None) -> str:
    return _DASH if value is None else write(value)


def _interval(write: Any, low: float | None, high: float | None) -> str:
    return _DASH if low is None or high is None else f"{write(low)} – {write(high)}"


def _round_up(value: float) -> float:
    """Return the end of an axis whose quarters are short numbers."""
    return next(end for end in (0.04, 0.08, 0.12, 0.2, 0.28, 0.4, 0.6, 1.0) if value <= end)


def _setup(classifier: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in classifier.items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, item in inner.items():
            title = part if part.startswith(name) else f"{name} {part}".strip()  # not "training training rows"
            lines.append((printable(title.replace("_", " ")), _written(item)))
    return lines


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_written(item) for item in value)
    return printable(value)
