"""Figures, names and dates as a reader sees them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from qwen_vl_classifier.evaluation.verdict import percent

SHORT = 80
"""Most characters of a name: of a class, slice, row or file."""

DASH = "—"

_SHOWN_CHARACTERS = 600
_MONTHS = (  # in English, whatever the locale
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

_METRICS: dict[str, tuple[str, int | None, str]] = {
    "accuracy": ("Accuracy", None, "share of rows that are answered correctly"),
    "balanced_accuracy": ("Balanced accuracy", None, "mean recall of both classes; guessing has 50 %"),
    "precision_1": ("Precision", 1, "of the rows answered so, the share for which this is correct"),
    "recall_1": ("Recall", 1, "of the rows of this class, the share that is found"),
    "f1_1": ("F1", 1, "precision and recall in one number (their harmonic mean); 1 is perfect"),
    "precision_0": ("Precision", 0, "of the rows answered so, the share for which this is correct"),
    "recall_0": ("Recall", 0, "of the rows of this class, the share that is found"),
    "f1_0": ("F1", 0, "precision and recall in one number (their harmonic mean); 1 is perfect"),
    "mcc": ("Matthews correlation (MCC)", None, "how well answers and labels agree; 0 is guessing, 1 is perfect"),
    "auroc": (
        "AUROC",
        None,
        "chance that a row of class 1 gets a higher probability than a row of class 0; 0.5 is guessing, 1 is perfect",
    ),
    "average_precision": ("Average precision", None, "mean precision over all thresholds; 1 is perfect"),
    "log_loss": ("Log loss", None, "error of the probabilities, lower is better; always saying 0.5 has 0.693"),
    "brier": ("Brier score", None, "mean squared error of the probabilities, lower is better; 0 is perfect"),
    "ece": ("Calibration error (ECE)", None, "how far probabilities are from observed frequencies, lower is better"),
}
_PERCENTAGES = {name for name in _METRICS if name.startswith(("accuracy", "balanced", "precision", "recall"))}


def printable(text: Any, most: int = _SHOWN_CHARACTERS) -> str:
    """Make a text fit to be shown: cut where it is very long, control characters as a sign.

    Letters that turn the direction of writing stay: they are part of a text, and the page isolates each text.
    """
    text = str(text)
    text = text if len(text) <= most else text[:most] + " …"
    return "".join(
        "\ufffd" if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" else sign for sign in text
    )


def file_name(path: str) -> str:
    """Return the last part of a path: the rest tells more about its owner's machine than a reader needs."""
    return printable(path.rstrip("/\\").replace("\\", "/").rpartition("/")[2], SHORT)


def date_of(moment: str) -> str:
    """Write a moment out: "28 November 2026, 20:31 (UTC+01:00)"; as it came if it is not ISO 8601."""
    try:
        when = datetime.fromisoformat(moment)
    except ValueError:
        return printable(moment, SHORT)
    zone = f" ({when.tzname()})" if when.tzinfo else ""
    return f"{when.day} {_MONTHS[when.month - 1]} {when.year}, {when:%H:%M}{zone}"


def metric_writer(key: str) -> Callable[[float], str]:
    """Return what writes a metric: shares as percentages, all others with three decimals."""
    return percent if key in _PERCENTAGES else "{:.3f}".format


def metric_rows(metrics: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write out each metric with `key`, `name`, `of`, `why`, `value`, `interval`, `majority` and `prior`.

    `of` is the class that the metric is about, or `None`.
    """
    rows = []
    for key, found in metrics.items():
        name, of, why = _METRICS[key]
        write = metric_writer(key)
        rows.append(
            {
                "key": key,
                "name": name,
                "of": of,
                "why": why,
                "value": or_dash(write, found["value"]),
                "interval": interval(write, found["low"], found["high"]),
                "majority": or_dash(write, baselines["majority"][key]),
                "prior": or_dash(write, baselines["prior"][key]),
            }
        )
    return rows


def metric_name(key: str) -> tuple[str, int | None]:
    """Return the name of a metric, and the class that it is about or `None`."""
    name, of, _ = _METRICS[key]
    return name, of


def or_dash(write: Callable[[float], str], value: float | None) -> str:
    """Write a value, or a dash where there is none."""
    return DASH if value is None else write(value)


def interval(write: Callable[[float], str], low: float | None, high: float | None) -> str:
    """Write an interval, or a dash where there is none."""
    return DASH if low is None or high is None else f"{write(low)} to {write(high)}"


def class_names(label_names: Sequence[str]) -> list[str]:
    """Return what both classes are called: their names, or "class 0" and "class 1" where they have none."""
    return [
        f"class {number}" if name == str(number) else printable(name, SHORT) for number, name in enumerate(label_names)
    ]


def described(classifier: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write out what a classifier is made of, as pairs of a name and a value."""
    lines = []
    for name, value in classifier.items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, item in inner.items():
            title = part if part.startswith(name) else f"{name} {part}".strip()  # not "training training rows"
            lines.append((printable(title.replace("_", " ")), _written(item)))
    return lines


def ticks(low: float, high: float) -> list[dict[str, Any]]:
    """Return at most seven round numbers on an axis: `at`, a share of its length, and `text`."""
    steps = (step * size for size in (0.0001, 0.001, 0.01, 0.1) for step in (1, 2, 2.5, 5))
    step = next(step for step in steps if (high - low) / step <= 6)
    first, last = round(low / step + 0.499999), round(high / step - 0.499999)
    return [
        {"at": (number * step - low) / (high - low), "text": f"{number * step:.4g}"}
        for number in range(first, last + 1)
    ]


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_written(item) for item in value)
    return printable(value)
