"""The content of a report as one JSON-able dictionary; the template lays it out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from qwen_vl_classifier.evaluation.report.cards import evaluation_cards
from qwen_vl_classifier.evaluation.report.findings import data_findings, look_sentences
from qwen_vl_classifier.evaluation.report.pictures import Thumbnails
from qwen_vl_classifier.evaluation.report.words import (
    DASH,
    SHORT,
    class_names,
    date_of,
    described,
    file_name,
    interval,
    metric_rows,
    or_dash,
    printable,
    ticks,
)
from qwen_vl_classifier.evaluation.slices import slice_verdict
from qwen_vl_classifier.evaluation.verdict import percent, skill_of

_SHOWN_SLICES = 30

_HEADLINES = ("accuracy", "balanced_accuracy", "f1_1", "auroc", "log_loss", "ece")


def summarise(evaluation: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
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
    curves = evaluation["curves"]
    metrics = metric_rows(evaluation["metrics"], evaluation["baselines"])
    names = class_names(evaluation["classifier"]["label_names"])
    edges = curves["histogram"]["edges"]
    return {
        "measured": measured_words(evaluation.get("measured")),
        "ask_again": label_command(evaluation.get("measured")),
        "badges": _badges(evaluation),
        "sentence": printable(evaluation["sentence"]),
        "tiles": _tiles(evaluation),
        "rows": evaluation["rows"],
        "names": names,
        "headlines": [row for row in metrics if row["key"] in _HEADLINES],
        "metrics": [row for row in metrics if row["key"] not in _HEADLINES],
        "looks": look_sentences(evaluation["checks"]),
        "thresholds": {"table": table, "stored": stored, "low": edges[0], "high": edges[-1], "names": names},
        "now": {**now, **_follow(now)},
        "prevalence": evaluation["rows"]["positives"] / evaluation["rows"]["total"],
        "curves": curves,
        "ticks": ticks(edges[0], edges[-1]),
        "most_risk": _round_up(max(curves["risk_coverage"]["risk"])),
        "most_cost": _round_up(max(max(curves["cost"][name]) for name in ("trivial", "calibrated"))),
        "band": _band(curves["risk_coverage"]["stored"]),
        "slices": [_slice(entry) for entry in evaluation["slices"][:_SHOWN_SLICES]],
        "notes": [printable(note) for note in evaluation["notes"]],
        "cards": evaluation_cards(evaluation, thumbnails),
        "findings": data_findings(evaluation["data"]),
        "setup": described(evaluation["classifier"]),
    }


def measured_words(measured: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Write out what was measured: `classifier`, `data` and `date`, each `None` where it is not known."""
    known = measured or {}
    written = {"classifier": file_name, "data": file_name, "date": date_of}
    return {key: None if known.get(key) is None else write(known[key]) for key, write in written.items()}


def label_command(measured: Mapping[str, Any] | None) -> str:
    """Return the command that asks a person again about rows whose ids the page saves.

    Args:
        measured: Of an evaluation: `data` and `classifier` are named as they were on the command line, if known.
            Of a path that begins at the root, the last part stands: see `file_name`.
    """
    known = {
        key: file_name(value) if PurePosixPath(value).root or PureWindowsPath(value).root else printable(value)
        for key, value in (measured or {}).items()
        if value
    }
    words = ["label", known.get("data", "DATA"), "--rows", "rows.jsonl", "--out", "checked.jsonl"]
    if "classifier" in known:
        words += ["--classifier", known["classifier"]]
    return shlex.join(["qwen-vl-classifier", *words])


def _badges(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Say in two or three words what was shown and what was not; the sentence beside it has the figures."""
    rows, skill = evaluation["rows"], skill_of(evaluation["metrics"], evaluation["baselines"])
    if rows["positives"] in (0, rows["total"]):
        badges = [{"kind": "open", "text": "Only one class in the data"}]
    elif skill == "answers":
        badges = [{"kind": "good", "text": "Better than guessing"}]
    elif skill == "ranking":
        badges = [{"kind": "open", "text": "Ranks better than chance; answers not shown to be better"}]
    else:
        badges = [{"kind": "bad", "text": "Not shown to be better than guessing"}]
    if evaluation["checks"]["images_permuted"]["free"]:
        badges.append({"kind": "bad", "text": "Not shown to use the pictures"})
    seen = evaluation["data"]["trained_on"]["total"]
    if seen:
        rows_seen = "1 row" if seen == 1 else f"{seen:,} rows"
        badges.append({"kind": "bad", "text": f"At least {rows_seen} from its own training data"})
    # What takes a good result back comes before it.
    return sorted(badges, key=lambda badge: badge["kind"] == "good")


def _tiles(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures behind the verdict: `value`, what it is (`title`, of the class `of`) and how to read it."""
    rows, accuracy, counts = evaluation["rows"], evaluation["metrics"]["accuracy"], evaluation["confusion"]
    tiles: list[dict[str, Any]] = [
        {
            "title": "Answered correctly",
            "value": percent(accuracy["value"]),
            "note": f"95 % interval {interval(percent, accuracy['low'], accuracy['high'])}",
        },
        {
            "title": "Correct by guessing",
            "value": percent(evaluation["baselines"]["majority"]["accuracy"]),
            "note": "always giving the more frequent answer",
        },
        {
            "title": "Missed",
            "of": 1,
            "value": f"{counts['false_negative']:,}",
            "note": f"of {rows['positives']:,} rows",
        },
        {
            "title": "False alarms",
            "of": 1,
            "value": f"{counts['false_positive']:,}",
            "note": f"of the other {rows['negatives']:,} rows",
        },
    ]
    if rows["abstained"]:
        tiles.append(
            {"title": "No answer", "value": f"{rows['abstained']:,}", "note": "rows on which the classifier abstains"}
        )
    shuffled = evaluation["checks"]["images_permuted"]
    if shuffled["reason"] is None and shuffled["accuracy"]:
        own = percent(shuffled["accuracy"]["before"])
        tiles.append(
            {
                "title": "Correct with other rows' pictures",
                "value": percent(shuffled["accuracy"]["after"]),
                "note": f"{own} with their own, on {shuffled['rows']:,} rows",
            }
        )
    return [{"of": None} | tile for tile in tiles]


def _follow(now: Mapping[str, Any]) -> dict[str, str]:
    """Write out what follows from the counts at one threshold, as tuner.js does for the others."""
    tp, fp, fn, tn = (now[name] for name in ("tp", "fp", "fn", "tn"))
    shares = {
        "accuracy": (tp + tn, tp + fp + fn + tn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
    }
    written = {name: percent(part / whole) if whole else DASH for name, (part, whole) in shares.items()}
    f1 = f"{2 * tp / (2 * tp + fp + fn):.3f}" if tp + fp + fn else DASH
    return {**written, "f1": f1, "cost": f"{fp + fn:,}"}


def _band(stored: Mapping[str, Any] | None) -> str:
    if stored is None:
        return "This classifier always answers: it has no abstention band."
    low, high = stored["band"]
    dot = " (the dot)" if stored["risk"] is not None else ""
    return (
        f"This classifier gives no answer for probabilities from {low:.3f} to {high:.3f}: it answers "
        f"{percent(stored['coverage'])} of the rows{dot}."
    )


def _slice(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": printable(entry["name"], SHORT),
        "value": printable(entry["value"], SHORT),
        "rows": f"{entry['rows']:,}",
        "accuracy": percent(entry["accuracy"]["value"]),
        "interval": interval(percent, entry["accuracy"]["low"], entry["accuracy"]["high"]),
        "rest": or_dash(percent, entry["rest"]),
        "worse": entry["worse"],
        "verdict": slice_verdict(entry),
        "p_value": f"{entry['p_value']:.2g}",
    }


def _round_up(value: float) -> float:
    """Return the end of an axis whose quarters are short numbers."""
    return next(end for end in (0.04, 0.08, 0.12, 0.2, 0.28, 0.4, 0.6, 1.0) if value <= end)
