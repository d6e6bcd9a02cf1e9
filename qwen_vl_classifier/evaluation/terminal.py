"""An evaluation, or a comparison, in a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_classifier.evaluation.checks import CHECKS
from qwen_vl_classifier.evaluation.metrics import LOWER_IS_BETTER, rounded

WIDTH = 80

_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision_1": "precision of {1}",
    "recall_1": "recall of {1}",
    "f1_1": "F1 of {1}",
    "precision_0": "precision of {0}",
    "recall_0": "recall of {0}",
    "f1_0": "F1 of {0}",
    "mcc": "MCC",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "ECE",
}
_CHECK_WORDS = {
    "images_permuted": "other pictures",
    "images_grey": "grey pictures",
    "texts_permuted": "other texts",
}
_WORD_COLUMNS = 14  # of a class name: the table stays within WIDTH
_MOST_SLICES = 5


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """Lay an evaluation out for a terminal: the sentence, metrics, confusion, checks, worst slices and notes."""
    parts = [
        textwrap.fill(evaluation["sentence"], WIDTH, break_on_hyphens=False),
        _metrics(evaluation),
        _confusion(evaluation),
        _checks(evaluation["checks"]),
        _slices(evaluation["slices"]),
        "\n".join(_note(note) for note in evaluation["notes"]),
    ]
    return _printable("\n\n".join(part for part in parts if part))


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Lay a comparison of two classifiers out for a terminal."""
    words = _metric_names(comparison["a"]["label_names"])
    first = max(18, 2 + max(map(len, words.values())))
    lines = [f"{'':<{first}}{'A':>8}{'B':>8}{'A - B':>9}   {'95 % interval':<18} better"]
    for name, entry in comparison["metrics"].items():
        lines.append(
            f"{words[name]:<{first}}{rounded(entry['a']):>8}{rounded(entry['b']):>8}{_signed(entry['difference']):>9}"
            f"   {_span(entry, signed=True):<18} {entry['better'] or '-'}"
        )
    test = comparison["mcnemar"]
    rest = (
        f"right where the other is wrong: A on {test['only_a']:,} rows, B on {test['only_b']:,} (McNemar's exact test: "
        f"p={test['p_value']:.3g})"
    )
    names = [_note(f"{side.upper()}  {comparison[side]['name']}", "") for side in ("a", "b")]
    parts = [
        textwrap.fill(comparison["sentence"], WIDTH, break_on_hyphens=False),
        "\n".join(names),
        "\n".join(lines),
        textwrap.fill(rest, WIDTH),
        *(_note(note) for note in comparison["notes"]),
    ]
    return _printable("\n\n".join(parts))


def _metrics(evaluation: Mapping[str, Any]) -> str:
    words = {
        name: text + (" *" if name in LOWER_IS_BETTER else "")
        for name, text in _metric_names(evaluation["classifier"]["label_names"]).items()
    }
    first = max(20, 2 + max(map(len, words.values())))
    lines = [f"{'':<{first}}{'value':>8}   {'95 % interval':<18}{'majority':>9}{'prior':>9}"]
    majority, prior = evaluation["baselines"]["majority"], evaluation["baselines"]["prior"]
    for name, entry in evaluation["metrics"].items():
        lines.append(
            f"{words[name]:<{first}}{rounded(entry['value']):>8}   {_span(entry):<18}"
            f"{rounded(majority[name]):>9}{rounded(prior[name]):>9}"
        )
    return "\n".join([*lines, "* less is better"])


def _metric_names(label_names: Sequence[str]) -> dict[str, str]:
    """Return what metrics are called, with the names of the classes: "precision of cat", or "precision of class 1"."""
    names = [
        f"class {number}" if name == str(number) else textwrap.shorten(name, _WORD_COLUMNS, placeholder="…")
        for number, name in enumerate(label_names)
    ]
    return {metric: text.format(*names) for metric, text in _METRICS.items()}


def _confusion(evaluation: Mapping[str, Any]) -> str:
    counts, threshold = evaluation["confusion"], evaluation["classifier"]["threshold"]
    no, yes = (
        name if name == str(number) else f"{number} ({textwrap.shorten(name, _WORD_COLUMNS, placeholder='…')})"
        for number, name in enumerate(evaluation["classifier"]["label_names"])
    )
    width = max(12, *(len(f"answer {name}") + 2 for name in (no, yes)))
    first = max(20, *(len(f"label {name}") + 2 for name in (no, yes)))
    return "\n".join(
        [
            f"{f'at threshold {threshold:.3g}':<{first}}{f'answer {no}':>{width}}{f'answer {yes}':>{width}}",
            f"{f'label {no}':<{first}}{counts['true_negative']:>{width},}{counts['false_positive']:>{width},}",
            f"{f'label {yes}':<{first}}{counts['false_negative']:>{width},}{counts['true_positive']:>{width},}",
        ]
    )


def _checks(checks: Mapping[str, Any]) -> str:
    if not any(checks[name]["rows"] for name in CHECKS):
        return "\n".join(
            sorted({_note(f"not checked whether it uses pictures and texts: {checks[CHECKS[0]]['reason']}")})
        )
    lines = [f"{'drop with':<16}{'AUROC':>7}  {'95 % interval':<17}{'accuracy':>9}  95 % interval"]
    for name in CHECKS:
        check, words = checks[name], _CHECK_WORDS[name]
        if check["reason"]:
            lines.append(f"{words:<16}{'n/a':>7}  {check['reason']}")
            continue
        auroc, accuracy = (_lost(check[metric]) for metric in ("auroc", "accuracy"))
        shown = "" if not check["free"] else "no drop"
        lines.append(f"{words:<16}{auroc[0]:>7}  {auroc[1]:<17}{accuracy[0]:>9}  {accuracy[1]:<18}{shown}".rstrip())
    return "\n".join(lines)


def _slices(slices: Sequence[Mapping[str, Any]]) -> str:
    if not slices:
        return ""
    worse = [entry for entry in slices if entry["worse"]]
    heading = f"worse than the rest ({len(worse)} of {len(slices)} slices)"
    if not worse:
        heading = f"no slice of {len(slices)} is shown to be worse than the rest; the lowest"
    lines = [f"{heading:<62}{'rows':>6}{'p':>10}"]
    for entry in worse[:_MOST_SLICES] or slices[:1]:
        name = textwrap.shorten(f"{entry['name']}: {entry['value']}", 36, placeholder="…")
        accuracy = f"{rounded(entry['accuracy']['value'])} {_span(entry['accuracy'])}"
        lines.append(f"  {name:<37}{accuracy:<23}{entry['rows']:>6,}{entry['p_value']:>10.2g}")
    return "\n".join(lines)


def _note(text: str, mark: str = "- ") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=mark, subsequent_indent="  ", break_on_hyphens=False)


def _printable(table: str) -> str:
    """Replace control characters: values of columns come from strangers, and a terminal would obey."""
    return "".join("\ufffd" if character != "\n" and not character.isprintable() else character for character in table)


def _lost(drop: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("n/a", "") if drop is None else (_signed(drop["drop"]), _span(drop, signed=True))


def _span(entry: Mapping[str, Any], *, signed: bool = False) -> str:
    if entry["low"] is None:
        return ""
    write = _signed if signed else rounded
    return f"[{write(entry['low'])}, {write(entry['high'])}]"


def _signed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.3f}"
