"""Lay out an evaluation or a comparison for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    "ece": "calibration error",
}
_CHECK_WORDS = {
    "images_permuted": "other pictures",
    "images_grey": "grey pictures",
    "texts_permuted": "other texts",
}
_WORD_COLUMNS = 14  # of a class name: the table stays within WIDTH
_MOST_SLICES = 5
_MOST_PAIRS = 10
_MOST_ROWS = 8  # on which answers differ
_MOST_COLUMNS = 5  # of classifiers beside a row
_SMALLEST_CHANCE = 0.001  # what is printed of a p-value


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """Lay an evaluation out for a terminal: the sentence, metrics, confusion, checks, worst slices and notes."""
    parts = [
        "\n".join(map(filled, (evaluation["sentence"], _measured(evaluation)))),
        _metrics(evaluation),
        _confusion(evaluation),
        _checks(evaluation["checks"]),
        _slices(evaluation["slices"]),
        "\n".join(bullet(note) for note in evaluation["notes"]),
    ]
    return printable_table("\n\n".join(part for part in parts if part))


def _measured(evaluation: Mapping[str, Any]) -> str:
    """Say what was measured on which rows."""
    about, rows = evaluation["measured"], evaluation["rows"]
    no, yes = (_class_name(name, number) for number, name in enumerate(evaluation["classifier"]["label_names"]))
    counts = f"{rows['negatives']:,} {no}, {rows['positives']:,} {yes}"
    who = f"Measured: {about['classifier']} on " if about["classifier"] else "Measured on "
    return f"{who}{about['data'] or 'the given rows'} ({counts})."


def _class_name(name: str, number: int) -> str:
    """Return the name of a class within some columns, "class 1" where it has none."""
    return f"class {number}" if name == str(number) else textwrap.shorten(name, _WORD_COLUMNS, placeholder="…")


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Lay a comparison out for a terminal: the sentence, the ranking, differences, and rows on which answers differ."""
    parts = [
        filled(comparison["sentence"]),
        _ranking(comparison),
        *([_every_metric(comparison)] if len(comparison["classifiers"]) == 2 else []),
        _pairs(comparison),
        _differing(comparison),
        "\n".join(bullet(note) for note in comparison["notes"]),
    ]
    return printable_table("\n\n".join(part for part in parts if part))


def _ranking(comparison: Mapping[str, Any]) -> str:
    lines = [f"{'':<32}{'accuracy':>9}   {'95 % interval':<18}{'AUROC':>7}{'log loss *':>11}"]
    for one in (comparison["classifiers"][index] for index in comparison["ranking"]):
        metrics = one["metrics"]
        name = f"{one['mark']}  {shortened(one['name'], 29 - len(one['mark']))}"
        lines.append(
            f"{name:<32}{rounded(metrics['accuracy']['value']):>9}   {span(metrics['accuracy']):<18}"
            f"{rounded(metrics['auroc']['value']):>7}{rounded(metrics['log_loss']['value']):>11}"
        )
    majority = comparison["baselines"]["majority"]["accuracy"]
    return "\n".join([*lines, f"{'-  always the larger class':<32}{rounded(majority):>9}", "* lower is better"])


def _every_metric(comparison: Mapping[str, Any]) -> str:
    """Lay out all metrics of two classifiers."""
    words = _metric_names(comparison["label_names"])
    first = max(18, 2 + max(map(len, words.values())))
    (pair,) = comparison["pairs"]
    marks = {side: comparison["classifiers"][pair[side]]["mark"] for side in ("a", "b")}
    gap = f"{marks['a']} - {marks['b']}"
    lines = [f"{'':<{first}}{marks['a']:>8}{marks['b']:>8}{gap:>9}   {'95 % interval':<18} better"]
    for name, entry in pair["metrics"].items():
        lines.append(
            f"{words[name]:<{first}}{rounded(entry['a']):>8}{rounded(entry['b']):>8}{_signed(entry['difference']):>9}"
            f"   {span(entry, signed=True):<18} {marks.get(entry['better'], '-')}"
        )
    return "\n".join(lines)


def _pairs(comparison: Mapping[str, Any]) -> str:
    """Lay out how often one is right where the other is wrong, and what McNemar's test says of it."""
    lines = [f"{'accuracy of':<14}{'difference':>10}   {'95 % interval':<18}{'right alone':>15}{'p':>9}  better"]
    for pair in comparison["pairs"][:_MOST_PAIRS]:
        marks = {side: comparison["classifiers"][pair[side]]["mark"] for side in ("a", "b")}
        entry, test = pair["metrics"]["accuracy"], pair["mcnemar"]
        alone = f"{test['only_a']:,} : {test['only_b']:,}"
        lines.append(
            f"{' against '.join(marks.values()):<14}{_signed(entry['difference']):>10}   "
            f"{span(entry, signed=True):<18}{alone:>15}{_chance(test['p_corrected']):>9}  "
            f"{marks.get(entry['better'], '-')}"
        )
    if len(comparison["pairs"]) > _MOST_PAIRS:
        lines.append(f"and {len(comparison['pairs']) - _MOST_PAIRS:,} more pairs")
    lines.append("right alone: rows on which only this one is right; p: McNemar's exact test")
    return "\n".join(lines)


def _differing(comparison: Mapping[str, Any]) -> str:
    rows, total = comparison["differing"], comparison["rows"]["total"]
    if not rows:
        return "All give the same answer to every row."
    chosen = comparison["ranking"][:_MOST_COLUMNS]
    shown = rows[:_MOST_ROWS]
    of = f"answers differ on {len(rows):,} of {total:,} rows"
    heading = f"{of}; the {len(shown)} on which probabilities lie farthest apart:" if shown != rows else f"{of}:"
    marks = "".join(f"{comparison['classifiers'][index]['mark']:>7} " for index in chosen)
    lines = [filled(heading), f"{'row':>6}  {'id or picture':<16}{'label':<16}{marks}".rstrip()]
    for row in shown:
        cells = "".join(
            f"{row['probabilities'][index]:>7.2f}{'x' if row['labels'][index] != row['label'] else ' '}"
            for index in chosen
        )
        name = shortened(row["id"] or Path(row["image"] or "").name, 15)
        label = shortened(comparison["label_names"][row["label"]], 15)
        lines.append(f"{row['row']:>6}  {name:<16}{label:<16}{cells}".rstrip())
        if len({other["text"] for other in shown}) > 1:
            lines.append(f"{'':8}{shortened(' '.join(row['text'].split()), WIDTH - 8)}")
    only = f"; of the {_MOST_COLUMNS} most accurate" if len(chosen) < len(comparison["ranking"]) else ""
    name = comparison["label_names"][1]
    of_class = "class 1" if name == "1" else shortened(name, 30)
    return "\n".join([*lines, f"x: wrong answer; numbers are probabilities of {of_class}{only}"])


def filled(text: str) -> str:
    """Break a text into lines of `WIDTH` columns."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def shortened(text: str, columns: int) -> str:
    """Leave out the middle of a text that is too long: names of files differ at both ends."""
    if len(text) <= columns:
        return text
    end = columns // 2
    return f"{text[: columns - end - 1]}…{text[len(text) - end :]}"


def _chance(value: float) -> str:
    return f"{value:.3f}" if value >= _SMALLEST_CHANCE else f"<{_SMALLEST_CHANCE}"


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
            f"{words[name]:<{first}}{rounded(entry['value']):>8}   {span(entry):<18}"
            f"{rounded(majority[name]):>9}{rounded(prior[name]):>9}"
        )
    return "\n".join([*lines, "* lower is better; majority, prior: guesses that ignore the rows"])


def _metric_names(label_names: Sequence[str]) -> dict[str, str]:
    """Return what metrics are called, with the names of the classes: "precision of cat", or "precision of class 1"."""
    names = [_class_name(name, number) for number, name in enumerate(label_names)]
    return {metric: text.format(*names) for metric, text in _METRICS.items()}


def _confusion(evaluation: Mapping[str, Any]) -> str:
    counts, threshold = evaluation["confusion"], evaluation["classifier"]["threshold"]
    no, yes = (
        textwrap.shorten(name, _WORD_COLUMNS, placeholder="…") for name in evaluation["classifier"]["label_names"]
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
            sorted({bullet(f"not checked whether it uses pictures and texts: {checks[CHECKS[0]]['reason']}")})
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
        accuracy = f"{rounded(entry['accuracy']['value'])} {span(entry['accuracy'])}"
        lines.append(f"  {name:<37}{accuracy:<23}{entry['rows']:>6,}{entry['p_value']:>10.2g}")
    return "\n".join(lines)


def bullet(text: str, mark: str = "- ") -> str:
    """Lay out one entry of a list."""
    return textwrap.fill(text, WIDTH, initial_indent=mark, subsequent_indent="  ", break_on_hyphens=False)


def printable_table(table: str) -> str:
    """Replace control characters: values of columns come from strangers, and a terminal would obey."""
    return "".join("\ufffd" if character != "\n" and not character.isprintable() else character for character in table)


def _lost(drop: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("n/a", "") if drop is None else (_signed(drop["drop"]), span(drop, signed=True))


def span(entry: Mapping[str, Any], *, signed: bool = False) -> str:
    """Write the interval of a figure; nothing where there is none."""
    if entry["low"] is None:
        return ""
    write = _signed if signed else rounded
    return f"[{write(entry['low'])}, {write(entry['high'])}]"


def _signed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.3f}"
