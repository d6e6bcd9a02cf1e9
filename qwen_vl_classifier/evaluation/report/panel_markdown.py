"""The summary of a panel's evaluation in Markdown, for an issue, a pull request or a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vl_classifier.evaluation.report.markdown import escaped
from qwen_vl_classifier.evaluation.report.words import DASH, interval, metric_name, metric_writer, or_dash
from qwen_vl_classifier.evaluation.verdict import percent

_LABEL_FIGURES = ("accuracy", "f1_1", "auroc", "average_precision", "log_loss", "ece")
_CLASS_FIGURES = ("precision_1", "recall_1", "f1_1", "auroc", "ece")
_WITH_INTERVAL = "f1_1"
_MOST_PAIRS = 10


def panel_markdown(evaluation: Mapping[str, Any]) -> str:
    """Write the summary.

    Args:
        evaluation: As `evaluate_panel` returns it.

    Returns:
        Markdown. Words that came with the data are escaped: they are shown as they are.
    """
    one_of = evaluation["one_of"]
    names = _CLASS_FIGURES if one_of else _LABEL_FIGURES
    lines = ["# Evaluation", "", f"**{escaped(evaluation['sentence'])}**", ""]
    if evaluation["notes"]:
        lines += [*(f"- {escaped(note)}" for note in evaluation["notes"]), ""]
    titles = [metric_name(name)[0] for name in names]
    titles.insert(1 + names.index(_WITH_INTERVAL), "95 % interval")
    lines.append(f"| {'class' if one_of else 'label'} | rows | {' | '.join(titles)} |")
    lines.append("|---|--:|" + "--:|" * len(titles))
    for label in evaluation["labels"]:
        rows = label["rows"]
        counted = f"{rows['positives']:,}" if one_of else f"{rows['positives']:,} of {rows['labelled']:,}"
        lines.append(f"| {escaped(label['name'])} | {counted} | {_cells(label['metrics'], names)} |")
    lines.append(f"| **mean (macro)** | | {_cells(evaluation['macro']['metrics'], names)} |")
    if one_of and one_of["confused"]:
        lines += ["", "## Most often confused", ""]
        lines += ["| class | answer | rows | share of the class |", "|---|---|--:|--:|"]
        for pair in one_of["confused"][:_MOST_PAIRS]:
            cells = (escaped(pair["label"]), escaped(pair["answer"]), f"{pair['count']:,}", percent(pair["share"]))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "More in report.html and evaluation.json beside this file.", ""]
    return "\n".join(lines)


def _cells(metrics: Mapping[str, Any], names: tuple[str, ...]) -> str:
    cells = []
    for name in names:
        entry, write = metrics[name], metric_writer(name)
        cells.append(or_dash(write, entry["value"]))
        if name == _WITH_INTERVAL:
            cells.append(interval(write, entry["low"], entry["high"]) if entry["value"] is not None else DASH)
    return " | ".join(cells)
