"""The sentences of a report: on checks that take pictures or texts away, and on problems in the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwen_vl_classifier.evaluation.verdict import percent

_CHECKS = {
    "images_permuted": "With the picture of another row",
    "images_grey": "With plain grey pictures",
    "texts_permuted": "With the text of another row",
}
_PAIRS = (
    (
        "exact_duplicates",
        "Repeated rows",
        "Rows with the same pictures and text as an earlier row. They count twice.",
        "Rows with the same pictures and text as a training row. They make the figures look too good.",
    ),
    (
        "near_duplicates",
        "Pictures that look alike",
        "Different files with nearly the same picture (perceptual hash).",
        "Pictures that nearly equal a training picture (perceptual hash). They may make the figures look too good.",
    ),
    (
        "label_conflicts",
        "Contradicting labels",
        "Rows with the same pictures and text as another row, but the other label. One of the two is wrong.",
        "Rows with the same pictures and text as a training row, but the other label. One of the two is wrong.",
    ),
)
_SHOWN_ROWS = 30


def look_sentences(checks: dict[str, Any]) -> list[str]:
    """Describe what it costs to take pictures or texts away.

    Args:
        checks: As `evaluate` returns them.
    """
    return [_look(what, checks[name]) for name, what in _CHECKS.items()]


def data_findings(data: dict[str, Any]) -> list[dict[str, str]]:
    """Describe what was found in the data.

    Args:
        data: As `evaluate` returns it.

    Returns:
        For each check `title`, `count` ("none" and "not checked" among them), `note` and `rows` (some of them named,
        or empty).
    """
    found = []
    for key, title, note, training_note in _PAIRS:
        found.append(_listed(title, note, data[key]["within"], "like"))
        found.append(_listed(f"{title}, training data", training_note, data[key]["training"], "training row"))
    note = "Rows with a picture of the training data. What was learned about it may not help with other pictures."
    found.append(_listed("Pictures seen in training", note, data["pictures_in_training"], "training row"))
    seen = data["trained_on"]
    found.append(_finding("Rows trained on", _count(seen) if seen["known"] else "not known", seen["note"], seen))
    issues = data["label_issues"]
    note = issues["reason"] or "Labels that the probabilities of other rows contradict, the likeliest mistakes first."
    found.append(_finding("Labels to check", "not checked" if issues["reason"] else _count(issues), note, issues))
    return found


def _look(what: str, check: dict[str, Any]) -> str:
    if check["reason"] is not None:
        return f"{what}: not measured ({check['reason']})."
    verdict = "it is not shown to get worse" if check["free"] else "it gets worse"
    drops = [
        _drop("accuracy", check["accuracy"], percent, 100, " points"),
        _drop("AUROC", check["auroc"], "{:.3f}".format, 1, ""),
    ]
    return f"{what}, {verdict}: {'; '.join(drop for drop in drops if drop)}. Measured on {check['rows']:,} rows."


def _drop(name: str, drop: dict[str, Any] | None, write: Callable[[float], str], scale: int, unit: str) -> str:
    """Say what a metric loses, with the loss times `scale` in a unit."""
    if drop is None:
        return ""
    digits = 3 if scale == 1 else 1
    lost, *ends = (
        None if drop[key] is None else f"{scale * drop[key]:.{digits}f}".replace("-", "−")
        for key in ("drop", "low", "high")
    )
    between = "" if ends[0] is None else f", 95 % interval {ends[0]} to {ends[1]}"
    return f"{name} goes from {write(drop['before'])} to {write(drop['after'])} (loss of {lost}{unit}{between})"


def _listed(title: str, note: str, found: dict[str, Any] | None, relation: str) -> dict[str, str]:
    if found is None:
        return {"title": title, "count": "not checked", "note": "No training data was given.", "rows": ""}
    return _finding(title, _count(found), note, found, relation)


def _count(found: dict[str, Any]) -> str:
    return f"{found['total']:,}" if found["total"] else "none"


def _finding(title: str, count: str, note: str, found: dict[str, Any], relation: str = "") -> dict[str, str]:
    shown = found["shown"][:_SHOWN_ROWS]
    rows = ", ".join(_reference(entry, relation) for entry in shown)
    more = f", and {found['total'] - len(shown):,} more" if found["total"] > len(shown) else ""
    return {"title": title, "count": count, "note": note, "rows": rows + more}


def _reference(entry: dict[str, Any] | int, relation: str) -> str:
    """Name a row, and where it is one of a pair, the other one."""
    if isinstance(entry, int):
        return str(entry)
    return f"{entry['row']} ({relation} {entry['other']})" if "other" in entry else str(entry["row"])
