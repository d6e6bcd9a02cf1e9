"""The outcome of `train` in words: whether it learned something, what was chosen and why, what limits the figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.objectives import Objective
from qwen_vl_classifier.training.probe.estimate import HELD_OUT
from qwen_vl_classifier.training.uncertainty import Skill, shown_skill

WIDTH = 80
BASELINES = ("zero-shot", "calibrated")
"""Heads that are read from the backbone, or fitted with two numbers; all others are trained."""

_SMALLEST_COST = 0.00005  # log losses are printed with four decimals
_HEADS = {
    "linear": "logistic regression",
    "mlp": "a small neural network (MLP)",
    "zero-shot": "the model's own answer without training (zero-shot)",
    "calibrated": "the model's own answer with a fitted scale and bias (calibrated zero-shot)",
}
_POOLINGS = {
    "mean": "the average over all tokens",
    "image": "the average over the tokens of the picture",
    "text": "the average over the tokens of the text",
    "last": "the last token",
}
_METHODS = {"temperature": "a temperature", "isotonic": "an isotonic curve", "platt": "a scale and a bias"}
_MEASURES = (("log_loss", "log loss"), ("auroc", "AUROC"), ("ece", "calibration error"))


def verdict_text(classifier: Classifier) -> str:
    """Say first whether a trained classifier is shown to be better than guessing, then how good it is: 80 columns."""
    return "\n".join(
        filled(line) if not line.startswith(" ") else _paragraph(line.strip(), "  ")
        for line in verdict_lines(classifier)
    )


def verdict_lines(classifier: Classifier) -> list[str]:
    """Return what `verdict_text` says, a line for each fact; those that belong to the one before begin with a space."""
    record = classifier.training
    estimate = record["estimate"]
    lines = [_verdict(estimate, record["table"][0]["head"], classifier.label_names), *_measure_lines(estimate)]
    other = record.get("estimate_new_texts")
    if other:
        lines += [f"With new texts too: {_accuracy_words(other, classifier.label_names)}.", *_measure_lines(other)]
    return lines


def choice_text(classifier: Classifier) -> str:
    """Say which head, layer, pooling, calibration and threshold were chosen, and why: 80 columns."""
    return "\n".join(map(_paragraph, choice_lines(classifier)))


def choice_lines(classifier: Classifier) -> list[str]:
    """Return what `choice_text` says, a line for each fact."""
    record, backbone = classifier.training, classifier.backbone
    chosen, tried = record["table"][0], len(record["table"])
    where = f"{_POOLINGS[classifier.tap.pooling]} {layer_words(classifier.tap, backbone.total_layers)}"
    why = f"with the lowest log loss of {tried} combinations in cross-validation" if tried > 1 else "the only one tried"
    first = f"Chosen: {_HEADS[chosen['head']]} on {where} ({chosen['head']} at {chosen['tap']}), {why}."
    if chosen["head"] not in BASELINES:
        first += f" It was then trained on all {record['training_rows']:,} rows."
    threshold = record["threshold"]
    named = class_words(classifier.label_names)
    return [
        first,
        f"Threshold: {named[1]} from a probability of {threshold['threshold']:.3f} on, "
        f"{objective_words(threshold['objective'])}.",
        _calibration_words(record["calibration"]),
        *_abstention_words(record.get("abstention")),
        *_exportable_words(record.get("exportable")),
        *_data_words(record),
        *(f"Note: {note}" for note in record["notes"]),
    ]


def class_words(label_names: Sequence[str]) -> tuple[str, str]:
    """Return class 0 and class 1 as they are called in a sentence: in quotation marks, or "class 1" without a name."""
    no, yes = (f"class {number}" if name == str(number) else f'"{name}"' for number, name in enumerate(label_names))
    return no, yes


def layer_words(tap: Tap, layers: int) -> str:
    """Say after which layer a tap reads."""
    if tap.layer == LAST_NORM:
        return "after the last layer and the final norm"
    return f"after layer {tap.layer} of {layers}" + (" and the final norm" if tap.normed else "")


def objective_words(objective: str) -> str:
    """Say how a threshold was chosen: for an objective, or "set by hand" as the record has it."""
    try:
        parsed = Objective.parse(objective)
    except ConfigError:
        return objective
    return f"chosen for {_goal(parsed)}"


def _goal(parsed: Objective) -> str:
    if parsed.kind == "cost":
        return f"the lowest cost, where a miss costs {parsed.miss:g} and a false alarm {parsed.false_alarm:g}"
    if parsed.kind in ("recall", "precision"):
        return f"a {parsed.kind} of at least {parsed.least:g}"
    return {"accuracy": "the most right answers", "f1": "the highest F1", "balanced": "the highest balanced accuracy"}[
        parsed.kind
    ]


def skill_of_estimate(estimate: Mapping[str, Any]) -> Skill:
    """Say what an estimate shows to be better than guessing, as `evaluate` does (`shown_skill`)."""
    majority = estimate["majority_accuracy"]
    accuracy, auroc = estimate["accuracy"], estimate["auroc"]
    return shown_skill(
        {"value": accuracy["mean"], "low": accuracy["low"]},
        auroc,
        estimate["log_loss"]["mean"],
        majority=majority,
        prior_log_loss=-sum(share * math.log(share) for share in (majority, 1 - majority) if share),
    )


def _verdict(estimate: Mapping[str, Any], head: str, label_names: Sequence[str]) -> str:
    if not estimate["samples"]:
        return f"Unknown whether it learned something: {_size(estimate)} are too few to say."
    skill = skill_of_estimate(estimate)
    words = _accuracy_words(estimate, label_names)
    few = f" {_size(estimate)}: too few to say how good it is; trust the intervals." if estimate["few"] else ""
    if skill == "none":
        return (
            f"No better than guessing, as far as these rows show: {words}.{few} What may help: more labelled "
            "rows, or a larger model."
        )
    if head in BASELINES:
        return f"Training did not beat the model's own answer (zero-shot), which is better than guessing: {words}.{few}"
    if skill == "ranking":
        return (
            "Learned something: it ranks the classes better than chance (AUROC "
            f"{interval_words(estimate['auroc'])}, chance is 0.5). It is not shown to be right more often than "
            f"guessing: {words}.{few}"
        )
    return f"Learned something: {words}.{few}"


def _accuracy_words(estimate: Mapping[str, Any], label_names: Sequence[str]) -> str:
    if not estimate["samples"]:
        return f"unknown; {_size(estimate)} are too few to say"
    named = class_words(label_names)
    label = estimate.get("majority_class")
    always = "the more frequent class" if label is None else named[label]
    majority = f"{estimate['majority_accuracy']:.3f} for always {always}"
    return f"accuracy {interval_words(estimate['accuracy'])} on new rows, against {majority}"


def _measure_lines(estimate: Mapping[str, Any]) -> list[str]:
    if not estimate["samples"]:
        return []
    words = [
        f"{title} {interval_words(estimate[name])}" for name, title in _MEASURES if estimate[name]["low"] is not None
    ]
    return [f"  {', '.join(words)}", f"  for {estimate['stands_for']}; 95 % intervals", f"  {_how(estimate)}"]


def _how(estimate: Mapping[str, Any]) -> str:
    if estimate["method"] == HELD_OUT:
        return f"on {estimate['rows']:,} held-out rows in {estimate['groups']:,} groups"
    return f"by {estimate['method']}, {_size(estimate)}"


def _size(estimate: Mapping[str, Any]) -> str:
    at_random = " drawn at random" if estimate.get("at_random") else ""
    return f"{estimate['rows']:,} rows{at_random} in {estimate['groups']:,} groups"


def interval_words(value: Mapping[str, float]) -> str:
    """Write a figure of an estimate with its interval."""
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _calibration_words(calibration: Mapping[str, Any]) -> str:
    if calibration["method"] == "none":
        line = f"Calibration: none; log loss {calibration['log_loss_before']:.4f}"
        worse = [
            f"{loss:.4f} with {_METHODS[method]}" for method, loss in calibration["tried"].items() if method != "none"
        ]
        return f"{line}, and {' or '.join(worse)}, on rows that it was not fitted on." if worse else f"{line}."
    return (
        f"Calibration: {_METHODS[calibration['method']]}; log loss {calibration['log_loss_before']:.4f} before and "
        f"{calibration['log_loss_after']:.4f} after, on rows that it was not fitted on."
    )


def _abstention_words(abstention: Mapping[str, Any] | None) -> list[str]:
    if not abstention:
        return []
    low, high = abstention["band"]
    return [
        f"Abstention: no answer for probabilities from {low:.3f} to {high:.3f}; {abstention['decided']:.1%} of "
        f"{abstention['rows']} held-out rows are decided; {abstention['guarantee']}."
    ]


def _exportable_words(exportable: Mapping[str, Any] | None) -> list[str]:
    """Say what it costs that the classifier can be exported, where it was trained to be."""
    if not exportable:
        return []
    other = exportable["unrestricted"]
    cost = exportable["log_loss"] - other["log_loss"]
    if cost < _SMALLEST_COST:
        return ["It can be exported, which costs nothing: no other tap or head has a lower log loss."]
    return [
        f"It can be exported, which costs {cost:.4f} of log loss: {exportable['log_loss']:.4f} in cross-validation, "
        f"against {other['log_loss']:.4f} for {other['head']} at {other['tap']}, which cannot be exported."
    ]


def _data_words(record: Mapping[str, Any]) -> list[str]:
    """Say what the rows hold, and which pictures are on both sides of splits without being known as the same."""
    data = record["data"]
    counted = [
        f"{data[what]:,} distinct {what.removesuffix('s') if data[what] == 1 else what}"
        for what in ("pictures", "texts")
        if data[what]
    ]
    lines = [f"Data: {record['training_rows']:,} rows: {', '.join(counted)}."]
    if data["alike"]["pairs"]:
        lines.append(
            f"Pairs of pictures in different groups that look alike: {data['alike']['pairs']:,} (compressed again, "
            "resized, or just similar). Give those that belong together the same value in a column named group."
        )
    return lines


def filled(text: str) -> str:
    """Break a paragraph into lines of 80 columns."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _paragraph(text: str, indent: str = "") -> str:
    """Break into lines, all but the first indented by two columns more."""
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
