"""The summary of a report in Markdown, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qwen_vl_classifier.evaluation.report.findings import look_sentences
from qwen_vl_classifier.evaluation.report.summary import metric_rows, percent, sentences, shown

_WORST_SLICES = 5


def markdown(evaluation: dict[str, Any], *, plots: Sequence[str] = (), without: str | None = None) -> str:
    """Write the summary.

    Args:
        evaluation: As `evaluate` returns it.
        plots: Names of the files in the folder `plots`; its PNG files are shown.
        without: Why there are no plots, or `None`.

    Returns:
        Markdown. Words that came with the data are escaped: they are shown as they are.
    """
    first, *others = sentences(evaluation)
    lines = ["# Evaluation", "", f"**{escaped(first)}**", "", *(f"{escaped(line)}\n" for line in others)]
    lines += ["| metric | value | 95 % interval | majority | prior |", "|---|--:|--:|--:|--:|"]
    for row in metric_rows(evaluation["metrics"], evaluation["baselines"]):
        lines.append("| {name} | {value} | {interval} | {majority} | {prior} |".format(**row))
    lines += ["", "## Does it look at the picture, does it read the text?", ""]
    lines += [f"- {escaped(line)}" for line in look_sentences(evaluation["checks"])]
    if evaluation["slices"]:
        lines += ["", "## Worst slices", "", "| slice | examples | accuracy | the rest | worse |", "|---|--:|--:|--:|---|"]
        for entry in evaluation["slices"][:_WORST_SLICES]:
            accuracy = percent(entry["accuracy"]["value"])
            rest = "" if entry["rest"] is None else percent(entry["rest"])
            name = f"{escaped(entry['name'])} = {escaped(entry['value'])}"
            lines.append(f"| {name} | {entry['rows']} | {accuracy} | {rest} | {'yes' if entry['worse'] else 'not shown'} |")
    if plots:
        lines += ["", "## Plots", ""]
        lines += [f"![{name[:-4].replace('_', ' ')}](plots/{name})" for name in plots if name.endswith(".png")]
    if without:
        lines += ["", escaped(without)]
    lines += ["", "More in report.html and evaluation.json beside this file.", ""]
    return "\n".join(lines)


def escaped(text: Any) -> str:
    """Write a text so that Markdown shows it as it is, in one line (CommonMark 0.31.2, section 2.4)."""
    line = " ".join(shown(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~@:])", r"\\\1", line)
