"""Describe the evaluation of several labels in one sentence, and in notes on its limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qwen_vl_classifier.errors import first_of, shown
from qwen_vl_classifier.evaluation.verdict import percent

_MOST_NAMED = 5  # labels in one note
_FEW_OF_A_CLASS = 10


def panel_sentence(evaluation: Mapping[str, Any]) -> str:
    """Say how good a panel is, and how many of its labels are shown to be better than guessing.

    Args:
        evaluation: With `one_of`, `macro`, `labels` and `rows`.
    """
    return _of_classes(evaluation) if evaluation["one_of"] else _of_labels(evaluation)


def _of_labels(evaluation: Mapping[str, Any]) -> str:
    measured = [label for label in evaluation["labels"] if label["rows"]["labelled"]]
    macro, total = evaluation["macro"]["metrics"], len(measured)
    better = Counter(label["skill"] for label in measured)
    accuracy = macro["accuracy"]
    majority = evaluation["macro"]["baselines"]["majority"]["accuracy"]
    over = f"on average over {total:,} labels" if total != 1 else "of one label"
    sentence = (
        f"Right on {percent(accuracy['value'])} of answers {over} (95 % interval {percent(accuracy['low'])} to "
        f"{percent(accuracy['high'])}), against {percent(majority)} for always giving each label's more frequent answer"
    )
    auroc = macro["auroc"]
    if auroc["value"] is not None:
        sentence += f"; AUROC {auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})"
    shown_better = better["answers"] + better["ranking"]
    if total == 1:
        return f"{sentence}. It is {'' if shown_better else 'not '}shown to be better than guessing."
    counted = {0: "None of them is", total: f"All {total:,} are", 1: "One of them is"}
    sentence += (
        f". {counted.get(shown_better, f'{shown_better:,} of the {total:,} labels are')} shown to be better than"
    )
    return f"{sentence} guessing."


def _of_classes(evaluation: Mapping[str, Any]) -> str:
    found, macro = evaluation["one_of"], evaluation["macro"]["metrics"]
    accuracy, f1 = found["metrics"]["accuracy"], macro["f1_1"]
    majority = found["baselines"]["majority"]["accuracy"]
    rows = f"{found['rows']:,} rows" if found["rows"] != 1 else "1 row"
    better = "better than" if accuracy["low"] > majority else "not shown to be better than"
    return (
        f"Names the right one of {len(evaluation['labels']):,} classes on {percent(accuracy['value'])} of {rows} (95 "
        f"% interval {percent(accuracy['low'])} to {percent(accuracy['high'])}), {better} the {percent(majority)} of "
        f"always naming the most frequent class; macro-F1 {f1['value']:.3f} ({f1['low']:.3f} to {f1['high']:.3f})."
    )


def panel_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Say what limits the numbers: missing labels, rare classes, labels no better than guessing, seen rows.

    Args:
        evaluation: With all but `sentence` and `notes`.
    """
    rows, labels, checks = evaluation["rows"], evaluation["labels"], evaluation["checks"]
    words = "class" if evaluation["one_of"] else "label"
    notes = []
    if rows["groups"] < rows["total"]:
        notes.append(
            f"{rows['total']:,} rows in {rows['groups']:,} groups that share a picture, text or group: intervals are "
            "made by resampling whole groups"
        )
    if rows["unlabelled"]:
        counted = "1 row has" if rows["unlabelled"] == 1 else f"{rows['unlabelled']:,} rows have"
        notes.append(f"{counted} no {words} and {'is' if rows['unlabelled'] == 1 else 'are'} not counted")
    if not evaluation["one_of"] and rows["complete"] + rows["unlabelled"] < rows["total"]:
        notes.append(
            "labels are missing in some rows: each label is measured on the rows that have it, and "
            f"{rows['complete']:,} of {rows['total']:,} rows have all"
        )
    if without := [label["name"] for label in labels if not label["rows"]["labelled"]]:
        notes.append(f"no row has a value of {_listed(without)}: left out of every mean")
    single = [one["name"] for one in labels if one["rows"]["labelled"] and not _fewest(one)]
    if single:
        what = "no row is of" if evaluation["one_of"] else "all rows are of one class of"
        notes.append(f"{what} {_listed(single)}: some figures are not known there")
    if few := [label["name"] for label in labels if 0 < _fewest(label) < _FEW_OF_A_CLASS]:
        what = "of a class" if not evaluation["one_of"] else ""
        notes.append(f"fewer than {_FEW_OF_A_CLASS} rows {what}: {_listed(few)}".replace("  ", " ").replace(" :", ":"))
    guesses = [label["name"] for label in labels if label["skill"] == "none" and _fewest(label)]
    if guesses:
        notes.append(f"not shown to be better than guessing: {_listed(guesses)}")
    for name, what in (("images_permuted", "picture"), ("texts_permuted", "text")):
        if checks[name]["free"]:
            notes.append(f"it is not shown to use the {what}s: {check_words(checks[name], what)}")
    checked = max(check["rows"] for check in checks.values())
    if 0 < checked < rows["total"] and checked < rows["with_picture"]:
        notes.append(f"pictures and texts were shuffled on {checked:,} rows drawn at random")
    if evaluation["trained_on"]["total"]:
        notes.append(f"{evaluation['trained_on']['note']}: results look better than they are")
    return notes


def check_words(check: Mapping[str, Any], what: str, *, grey: bool = False) -> str:
    """Say what the mean AUROC loses with the pictures or texts of other rows.

    Args:
        check: One that was made.
        what: "picture" or "text".
        grey: Whether the pictures were grey ones.
    """
    drop, other = check["auroc"], "a grey one" if grey else "another row's"
    return (
        f"AUROC {drop['before']:.3f} with each row's own {what}, {drop['after']:.3f} with {other}, on "
        f"{check['rows']:,} rows (drop {drop['drop']:.3f}, 95 % interval {drop['low']:.3f} to {drop['high']:.3f})"
    )


def _fewest(label: Mapping[str, Any]) -> int:
    fewest: int = min(label["rows"]["positives"], label["rows"]["negatives"])
    return fewest


def _listed(names: list[str]) -> str:
    return first_of([shown(name) for name in names], most=_MOST_NAMED)
