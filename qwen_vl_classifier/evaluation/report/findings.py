"""What a report says in words: of checks that take pictures or texts away, and of what is odd in the data."""

from __future__ import annotations

from typing import Any

_CHECKS = {
    "images_permuted": "Giving each text another row's picture",
    "images_grey": "Showing plain grey instead of the pictures",
    "texts_permuted": "Giving each picture another row's text",
}
_PAIRS = (
    (
        "exact_duplicates",
        "Repeated rows",
        "The same pictures and text as an earlier row: they count twice.",
        "The same pictures and text as a row of the training data: the numbers flatter.",
    ),
    (
        "near_duplicates",
        "Pictures that look alike",
        "Different files, nearly the same picture (perceptual hash).",
        "Nearly the same picture (perceptual hash) as one of the training data: the numbers may flatter.",
    ),
    (
        "label_conflicts",
        "Contradicting labels",
        "The same pictures and text as an earlier row, with another label.",
        "The same pictures and text as a row of the training data, with another label.",
    ),
)
_SHOWN_ROWS = 30


def look_sentences(checks: dict[str, Any]) -> list[str]:
    """Say in words what it costs to take pictures or texts away.

    Args:
        checks: As `evaluate` returns them.
    """
    return [_look(what, checks[name]) for name, what in _CHECKS.items()]


def data_findings(data: dict[str, Any]) -> list[dict[str, str]]:
    """Say what was found in the data.

    Args:
        data: As `evaluate` returns it.

    Returns:
        For each check `title`, `count` ("none" and "not looked for" among them), `note` and `rows` (some of them named,
        or empty).
    """
    found = []
    for key, title, note, training_note in _PAIRS:
        found.append(_listed(title, note, data[key]["within"], "like"))
        found.append(_listed(f"{title}, training data", training_note, data[key]["training"], "training row"))
    note = "With any text. What was learnt about these pictures may help here, and not elsewhere."
    found.append(_listed("Pictures seen in training", note, data["pictures_in_training"], "training row"))
    seen = data["trained_on"]
    found.append(_finding("Rows trained on", _count(seen) if seen["known"] else "not known", seen["note"], seen))
    issues = data["label_issues"]
    note = issues["reason"] or "Labels that the other rows speak against, the likeliest mistakes first."
    found.append(_finding("Labels to check", "not looked for" if issues["reason"] else _count(issues), note, issues))
    return found


def _look(what: str, check: dict[str, Any]) -> str:
    if check["reason"] is not None:
        return f"{what}: not measured ({check['reason']})."
    drops = [
        f"{name} goes from {drop['before']:.3f} to {drop['after']:.3f}, a drop of {drop['drop']:.3f}{_interval(drop)}"
        for name, drop in (("accuracy", check["accuracy"]), ("AUROC", check["auroc"]))
        if drop is not None
    ]
    verdict = "costs nothing that these rows can show" if check["free"] else "makes it worse"
    return f"{what} {verdict}: {'; '.join(drops)}; over {check['rows']:,} rows."


def _interval(drop: dict[str, Any]) -> str:
    if drop["low"] is None:
        return ""
    return f" (95 % interval {drop['low']:.3f} to {drop['high']:.3f})"


def _listed(title: str, note: str, found: dict[str, Any] | None, relation: str) -> dict[str, str]:
    if found is None:
        return {"title": title, "count": "not looked for", "note": "No training data was given.", "rows": ""}
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
