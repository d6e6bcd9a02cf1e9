"""Describe an evaluation or a comparison in one sentence, and in notes on its limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_vl_classifier.classifier.score_distribution import LARGE, MODERATE
from qwen_vl_classifier.training.uncertainty import Skill, shown_skill

_MOST_NAMES = 3  # of classifiers in one list


def percent(share: float) -> str:
    """Write a share between 0 and 1 as a percentage with one decimal, never rounding up to 100 %."""
    value = round(100 * share, 1)
    return f"{min(value, 99.9) if share < 1 else value:.1f} %"


def skill_of(metrics: dict[str, Any], baselines: dict[str, Any]) -> Skill:
    """Say what a classifier is shown to do better than guessing, as `shown_skill` does.

    Args:
        metrics: As `evaluate` returns them.
        baselines: As `evaluate` returns them.
    """
    return shown_skill(
        metrics["accuracy"],
        metrics["auroc"],
        metrics["log_loss"]["value"],
        majority=baselines["majority"]["accuracy"],
        prior_log_loss=baselines["prior"]["log_loss"],
    )


def sentence_of(evaluation: dict[str, Any]) -> str:
    """Say how good a classifier is, and whether it uses the pictures; where it does not though it is good, that first.

    Args:
        evaluation: With `metrics`, `baselines`, `rows` and `checks`.
    """
    accuracy, rows = evaluation["metrics"]["accuracy"], evaluation["rows"]["total"]
    majority = evaluation["baselines"]["majority"]["accuracy"]
    better = accuracy["low"] > majority
    examples = f"{rows:,} rows" if rows != 1 else "1 row"
    sentence = (
        f"Right on {percent(accuracy['value'])} of {examples} (95 % interval {percent(accuracy['low'])} to "
        f"{percent(accuracy['high'])})"
    )
    if evaluation["rows"]["positives"] in (0, rows):
        only = int(evaluation["rows"]["positives"] > 0)
        sentence += f"; every row is of class {only}, so this says nothing about the other class."
    else:
        sentence += f", {'better than' if better else 'not shown to be better than'} the {percent(majority)} of always "
        sentence += "giving the more frequent answer."
        if skill_of(evaluation["metrics"], evaluation["baselines"]) == "ranking":
            auroc = evaluation["metrics"]["auroc"]
            sentence += (
                f" It ranks the classes better than chance (AUROC {auroc['value']:.3f}, 95 % interval "
                f"{auroc['low']:.3f} to {auroc['high']:.3f})."
            )
    shuffled = evaluation["checks"]["images_permuted"]
    if shuffled["free"]:
        without = f"It is not shown to use the pictures: {_drop(shuffled, 'picture')}."
        return f"{without} {sentence}" if better else f"{sentence} {without}"
    return sentence


def notes_of(evaluation: dict[str, Any]) -> list[str]:
    """Say what limits the numbers: texts that do not matter, seen rows, rows left out, contradictions.

    Args:
        evaluation: With all but `sentence` and `notes`.
    """
    rows, checks, data = evaluation["rows"], evaluation["checks"], evaluation["data"]
    notes = []
    if rows["groups"] < rows["total"]:
        notes.append(
            f"{rows['total']:,} rows in {rows['groups']:,} groups that share a picture, text or group: intervals are "
            "made by resampling whole groups"
        )
    confusion = evaluation["confusion"]
    if not confusion["false_positive"] + confusion["false_negative"]:
        notes.append(
            "no answer is wrong, and resampling cannot invent mistakes: the intervals of log loss, Brier score and "
            "calibration error are too narrow"
        )
    if rows["abstained"]:
        notes.append(f"it abstains on {rows['abstained']:,} rows; they count by the side of the threshold they are on")
    if checks["texts_permuted"]["free"]:
        notes.append(f"it is not shown to use the texts: {_drop(checks['texts_permuted'], 'text')}")
    checked = max(check["rows"] for check in checks.values())
    if 0 < checked < rows["total"] and checked < rows["with_picture"]:
        notes.append(f"pictures and texts were shuffled on {checked:,} rows drawn at random")
    drift = evaluation.get("score_drift")
    if drift and drift["psi"] > max(MODERATE, drift["chance"]):
        size = "large" if drift["psi"] > LARGE else "moderate"
        notes.append(
            f"scores differ from those in training, a {size} change: population stability index {drift['psi']:.2f}, "
            f"which by chance exceeds {drift['chance']:.2f} once in 1,000 times"
        )
    if data["trained_on"]["total"]:
        notes.append(f"{data['trained_on']['note']}: results look better than they are")
    seen = data["pictures_in_training"]
    if seen and seen["total"]:
        notes.append(f"the pictures of {seen['total']:,} rows are in the training data")
    training = data["near_duplicates"]["training"]
    if training and training["total"]:
        notes.append(f"pairs that look alike: {training['total']:,} of pictures here and in the training data")
    if total := data["exact_duplicates"]["within"]["total"]:
        notes.append(f"rows that repeat an earlier row: {total:,}")
    if total := data["label_conflicts"]["within"]["total"]:
        notes.append(f"rows with the same pictures and text as another, but not its label: {total:,}")
    near = data["near_duplicates"]
    if near["compared"] < near["pictures"]:
        notes.append(f"near-duplicates were searched among {near['compared']:,} of {near['pictures']:,} pictures")
    return notes


def comparison_sentence(comparison: dict[str, Any]) -> str:
    """Say which classifier is right most often, and than which others it is shown to be better.

    Args:
        comparison: As `compare` returns it; all but `sentence` and `notes`.
    """
    best, *others = (comparison["classifiers"][index] for index in comparison["ranking"])
    first = [pair for pair in comparison["pairs"] if comparison["classifiers"][pair["a"]] is best]
    accuracies = [pair["metrics"]["accuracy"] for pair in first]
    rows = f"{comparison['rows']['total']:,} rows" if comparison["rows"]["total"] != 1 else "1 row"
    own = f"{percent(best['metrics']['accuracy']['value'])} of {rows}"
    if len(others) == 1:
        (entry,), (other,) = accuracies, others
        gap = (
            f"difference {100 * entry['difference']:.1f} points, 95 % interval {100 * entry['low']:.1f} to "
            f"{100 * entry['high']:.1f}"
        )
        theirs = percent(other["metrics"]["accuracy"]["value"])
        if entry["better"]:
            return f"{best['name']} is right more often than {other['name']}: {own} against {theirs} ({gap})."
        return f"Neither is shown to be right more often: {best['name']} {own}, {other['name']} {theirs} ({gap})."
    beaten = [other["name"] for other, entry in zip(others, accuracies, strict=True) if entry["better"]]
    rest = [other["name"] for other, entry in zip(others, accuracies, strict=True) if not entry["better"]]
    if not rest:
        return f"{best['name']} is right more often than each of the others: {own}."
    if not beaten:
        return f"{best['name']} is right most often, on {own}, but is not shown to be better than any of the others."
    return (
        f"{best['name']} is right most often, on {own}. It is shown to be better than {_listed(beaten)}, but not than "
        f"{_listed(rest)}."
    )


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:_MOST_NAMES])
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _drop(check: dict[str, Any], what: str) -> str:
    name = "auroc" if check["auroc"] else "accuracy"
    drop = check[name]
    words = {"auroc": "AUROC", "accuracy": "accuracy"}[name]
    return (
        f"{words} {drop['before']:.3f} with each row's own {what}, {drop['after']:.3f} with another row's, on "
        f"{check['rows']:,} rows (drop {drop['drop']:.3f}, 95 % interval {drop['low']:.3f} to {drop['high']:.3f})"
    )
