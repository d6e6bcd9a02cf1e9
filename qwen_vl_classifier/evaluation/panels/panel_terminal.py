"""Lay out the evaluation of a panel for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwen_vl_classifier.evaluation.checks import CHECKS
from qwen_vl_classifier.evaluation.metrics import rounded
from qwen_vl_classifier.evaluation.terminal import bullet, filled, printable_table, shortened, span
from qwen_vl_classifier.evaluation.verdict import percent

_NAME = 21  # columns of a label's name
_MOST_LABELS = 40
_MOST_PAIRS = 8
_CHECK_WORDS = {"images_permuted": "pictures", "images_grey": "grey pictures", "texts_permuted": "texts"}


def panel_table(evaluation: Mapping[str, Any]) -> str:
    """Lay the evaluation of a panel out: the sentence, labels or classes, what is confused, checks and notes."""
    parts = [
        "\n".join(map(filled, (evaluation["sentence"], _measured(evaluation)))),
        _classes(evaluation) if evaluation["one_of"] else _labels(evaluation),
        _confused(evaluation["one_of"]) if evaluation["one_of"] else _together(evaluation),
        _checks(evaluation["checks"]),
        "\n".join(bullet(note) for note in evaluation["notes"]),
    ]
    return printable_table("\n\n".join(part for part in parts if part))


def _measured(evaluation: Mapping[str, Any]) -> str:
    about, rows, labels = evaluation["measured"], evaluation["rows"], evaluation["labels"]
    who = f"Measured: {about['panel']} on " if about["panel"] else "Measured on "
    what = "classes" if evaluation["one_of"] else "labels"
    return f"{who}{about['data'] or 'the given rows'} ({rows['total']:,} rows, {len(labels):,} {what})."


def _shown(evaluation: Mapping[str, Any], name: str) -> tuple[list[Mapping[str, Any]], str]:
    """Return the labels to print, of many those that do worst, and a line on the others."""
    labels = evaluation["labels"]
    if len(labels) <= _MOST_LABELS:
        return labels, ""

    def value(label: Mapping[str, Any]) -> float:
        found = label["metrics"][name]["value"]
        return math.inf if found is None else found

    worst = sorted(labels, key=value)[:_MOST_LABELS]
    return worst, f"the {_MOST_LABELS} of {len(labels):,} that do worst; all are in the report (--out)"


def _labels(evaluation: Mapping[str, Any]) -> str:
    shown, others = _shown(evaluation, "auroc")
    lines = [f"{'':<{_NAME}}{'rows':>7}{'yes':>7}{'accuracy':>10}  {'95 % interval':<16}{'F1':>6}{'AUROC':>7}"]
    for label in shown:
        rows, metrics = label["rows"], label["metrics"]
        mark = " *" if label["skill"] == "none" else ""
        lines.append(
            f"{shortened(label['name'], _NAME - 1):<{_NAME}}{rows['labelled']:>7,}{rows['positives']:>7,}"
            f"{_figures(metrics)}{mark}"
        )
    if len(evaluation["labels"]) > 1:
        macro = evaluation["macro"]
        lines.append(f"{'mean (macro)':<{_NAME + 14}}{_figures(macro['metrics'])}")
        guess = macro["baselines"]["majority"]
        lines.append(f"{'more frequent answer':<{_NAME + 14}}{rounded(guess['accuracy']):>10}")
    lines += [others] if others else []
    if any(label["skill"] == "none" for label in shown):
        lines.append("* not shown to be better than guessing")
    return "\n".join(lines)


def _figures(metrics: Mapping[str, Any]) -> str:
    accuracy, f1, auroc = (metrics[name] for name in ("accuracy", "f1_1", "auroc"))
    return (
        f"{rounded(accuracy['value']):>10}  {span(accuracy):<16}{rounded(f1['value']):>6}{rounded(auroc['value']):>7}"
    )


def _together(evaluation: Mapping[str, Any]) -> str:
    found = evaluation["exact_match"]
    if len(evaluation["labels"]) == 1 or found["value"] is None:
        return ""
    rows = f"{found['count']:,} rows that have all labels"
    return filled(
        f"All labels right on {percent(found['value'])} {span(found)} of {rows}; always giving the more frequent "
        f"answers: {percent(found['majority'])}."
    )


def _classes(evaluation: Mapping[str, Any]) -> str:
    shown, others = _shown(evaluation, "f1_1")
    lines = [f"{'':<{_NAME}}{'rows':>7}{'precision':>11}{'recall':>8}{'F1':>7}  {'95 % interval':<16}{'AUROC':>6}"]
    for label in shown:
        metrics = label["metrics"]
        lines.append(
            f"{shortened(label['name'], _NAME - 1):<{_NAME}}{label['rows']['positives']:>7,}{_class_figures(metrics)}"
        )
    macro, found = evaluation["macro"]["metrics"], evaluation["one_of"]
    lines.append(f"{'mean (macro)':<{_NAME}}{found['rows']:>7,}{_class_figures(macro)}")
    lines += [others] if others else []
    majority, prior = found["baselines"]["majority"], found["baselines"]["prior"]
    lines += ["", f"{'':<{_NAME}}{'value':>7}   {'95 % interval':<18}{'guessing':>9}"]
    for name, words, guess in (
        ("accuracy", "accuracy", majority["accuracy"]),
        ("log_loss", "log loss *", prior["log_loss"]),
        ("ece", "calibration error *", None),
    ):
        entry, guessed = found["metrics"][name], "" if guess is None else rounded(guess)
        lines.append(f"{words:<{_NAME}}{rounded(entry['value']):>7}   {span(entry):<18}{guessed:>9}".rstrip())
    return "\n".join([*lines, "* lower is better"])


def _class_figures(metrics: Mapping[str, Any]) -> str:
    precision, recall, f1, auroc = (metrics[name] for name in ("precision_1", "recall_1", "f1_1", "auroc"))
    return (
        f"{rounded(precision['value']):>11}{rounded(recall['value']):>8}{rounded(f1['value']):>7}  {span(f1):<16}"
        f"{rounded(auroc['value']):>6}"
    )


def _confused(found: Mapping[str, Any]) -> str:
    if not found["confused"]:
        return ""
    lines = [f"{'most often confused':<52}{'rows':>8}{'of the class':>14}"]
    for pair in found["confused"][:_MOST_PAIRS]:
        names = f"{shortened(pair['label'], 20)} answered {shortened(pair['answer'], 20)}"
        lines.append(f"  {names:<50}{pair['count']:>8,}{percent(pair['share']):>14}")
    return "\n".join(lines)


def _checks(checks: Mapping[str, Any]) -> str:
    made = [name for name in CHECKS if checks[name]["rows"]]
    if not made:
        return bullet(f"not checked whether it uses pictures and texts: {checks[CHECKS[0]]['reason']}")
    lines = [f"{'mean AUROC':<22}{'own':>8}{'with other':>12}{'drop':>8}   95 % interval"]
    for name in CHECKS:
        check, words = checks[name], _CHECK_WORDS[name]
        if not check["rows"]:
            lines.append(f"{words:<22}{'n/a':>8}  {check['reason']}")
            continue
        drop = check["auroc"]
        lost = f"{drop['drop']:+.3f}"
        between = f"[{drop['low']:+.3f}, {drop['high']:+.3f}]"
        shown = "   no drop" if check["free"] else ""
        lines.append(f"{words:<22}{rounded(drop['before']):>8}{rounded(drop['after']):>12}{lost:>8}   {between}{shown}")
    return "\n".join(lines)
