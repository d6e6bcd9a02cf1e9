"""The summary of a report in Markdown, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qwen_vl_classifier.evaluation.report.findings import look_sentences
from qwen_vl_classifier.evaluation.report.words import class_names, metric_rows, printable
from qwen_vl_classifier.evaluation.slices import slice_verdict
from qwen_vl_classifier.evaluation.verdict import percent

_WORST_SLICES = 5
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
_MEANT = re.compile(r"[\\`*_{}\[\]<>#|&~@!]|:(?=//)|(?<=www)\.")  # the last two begin links on many sites


def markdown(evaluation: dict[str, Any], *, plots: Sequence[str] = (), without: str | None = None) -> str:
    """Write the summary.

    Args:
        evaluation: As `evaluate` returns it.
        plots: Names of the files in the folder `plots`; its PNG files are shown.
        without: Why there are no plots, or `None`.

    Returns:
        Markdown. Words that came with the data are escaped: they are shown as they are.
    """
    names = class_names(evaluation["classifier"]["label_names"])
    lines = ["# Evaluation", "", f"**{escaped(evaluation['sentence'])}**", ""]
    if evaluation["notes"]:
        lines += [*(f"- {escaped(note)}" for note in evaluation["notes"]), ""]
    lines += ["| metric | value | 95 % interval | majority | prior |", "|---|--:|--:|--:|--:|"]
    for row in metric_rows(evaluation["metrics"], evaluation["baselines"]):
        name = row["name"] if row["of"] is None else f"{row['name']} of {escaped(names[row['of']])}"
        lines.append("| {name} | {value} | {interval} | {majority} | {prior} |".format(**row | {"name": name}))
    lines += ["", "## Does it look at the picture, does it read the text?", ""]
    lines += [f"- {escaped(line)}" for line in look_sentences(evaluation["checks"])]
    if evaluation["slices"]:
        lines += ["", "## Worst slices", ""]
        lines += ["| slice | examples | accuracy | the rest | verdict |", "|---|--:|--:|--:|---|"]
        for entry in evaluation["slices"][:_WORST_SLICES]:
            rest = "" if entry["rest"] is None else percent(entry["rest"])
            cells = (
                f"{escaped(entry['name'])} = {escaped(entry['value'])}",
                str(entry["rows"]),
                percent(entry["accuracy"]["value"]),
                rest,
                slice_verdict(entry),
            )
            lines.append(f"| {' | '.join(cells)} |")
    if plots:
        lines += ["", "## Plots", ""]
        lines += [f"![{name[:-4].replace('_', ' ')}](plots/{name})" for name in plots if name.endswith(".png")]
    if without:
        lines += ["", escaped(without)]
    lines += ["", "More in report.html and evaluation.json beside this file.", ""]
    return "\n".join(lines)


def escaped(text: Any) -> str:
    """Write a text so that Markdown shows it as it is, in one line (CommonMark 0.31.2, section 2.4).

    Signs that turn the direction of writing are replaced: Markdown cannot isolate a text, as the page does.
    """
    line = _TURNS.sub("\ufffd", " ".join(printable(text).split()))
    return _MEANT.sub(r"\\\g<0>", line)
