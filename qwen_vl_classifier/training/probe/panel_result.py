"""The result of `train_panel`: which labels were learned, and how well, in words and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.errors import first_of
from qwen_vl_classifier.files.html_pieces import fact_card, row_table
from qwen_vl_classifier.training.probe.outcome import BASELINES, WIDTH, filled, interval_words, skill_of_estimate
from qwen_vl_classifier.training.probe.result import TrainResult

_MOST_SHOWN = 10  # labels in the table
_MOST_NAMED = 5  # labels in a sentence
_NARROWEST = 8  # columns for the names of labels
_COLUMNS = ("label", "rows", "yes", "accuracy (95 %)", "AUROC", "tap", "head")


@dataclass(frozen=True, slots=True, repr=False)
class PanelTrainResult:
    """What `train_panel` found.

    Attributes:
        panel: The classifiers of all labels, trained on all rows that have the label.
        results: Of each label, by its name, what `train` returns.
    """

    panel: Panel
    results: dict[str, TrainResult]

    @property
    def estimate(self) -> dict[str, Any] | None:
        """How good the choice of one of several classes will be on new rows, as `one_of_estimate` has it, or `None`."""
        record = self.panel.training.get("one_of")
        return record["estimate"] if record else None

    def __str__(self) -> str:
        words = "\n".join(filled(line) for line in self._lines())
        return "\n\n".join([words, "\n".join(self._table())])

    def __repr__(self) -> str:
        what = f"one of {len(self.results)} classes" if self.panel.one_of else f"{len(self.results)} labels"
        accuracy = f", accuracy {interval_words(self.estimate['accuracy'])} on new rows" if self.estimate else ""
        return f"<PanelTrainResult: {what}{accuracy}>"

    def _repr_html_(self) -> str:
        """Return the summary and the table, for notebooks."""
        shown, note = self._shown()
        summary = fact_card("What train_panel found", {}, self._lines())
        return summary + row_table(_COLUMNS, map(_cells, shown), numbers=(1, 2, 3, 4), notes=[note] if note else [])

    def _lines(self) -> list[str]:
        """Return the outcome in words, a line for each fact."""
        record = self.panel.training
        lines = _class_lines(record["one_of"]) if self.panel.one_of else _label_lines(self.results)
        text = record.get("text")
        rows = f"Data: {record['training_rows']:,} rows with a label"
        lines.append(f"{rows}, all with the same text." if text else f"{rows}.")
        if any(result.estimate.get("at_random") for result in self.results.values()):
            lines.append("The table has shares and figures of the rows that were drawn at random.")
        notes = [*record["notes"], *_notes(self.results)]
        return [*lines, *(f"Note: {note}" for note in notes)]

    def _shown(self) -> tuple[list[tuple[str, TrainResult]], str]:
        """Return the labels of the table, of many those with the lowest AUROC, and a note about the others."""
        every = list(self.results.items())
        if len(every) <= _MOST_SHOWN:
            return every, ""
        worst = sorted(every, key=lambda one: _area(one[1]))[:_MOST_SHOWN]
        return (
            worst,
            f"and {len(every) - _MOST_SHOWN:,} more with a higher AUROC; the card of the panel (README.md) lists all",
        )

    def _table(self) -> list[str]:
        shown, note = self._shown()
        rows = [list(_COLUMNS), *map(_cells, shown)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        widths[0] = max(_NARROWEST, min(widths[0], WIDTH - sum(widths[1:]) - len(widths) + 1))
        lines = [
            " ".join(
                cell.rjust(width) if 0 < column < 5 else _cut(cell, width).ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return [*lines, *([note] if note else [])]


def _label_lines(results: Mapping[str, TrainResult]) -> list[str]:
    """Say which labels were learned."""
    skills: dict[str, list[str]] = {"answers": [], "ranking": [], "none": [], "unknown": []}
    for name, result in results.items():
        known = result.estimate["samples"]
        skills[skill_of_estimate(result.estimate) if known else "unknown"].append(name)
    total = len(results)
    lines = [f"Learned {len(skills['answers']):,} of {total:,} labels: right more often than guessing on new rows."]
    for kind, words in (
        ("ranking", "Only ranked better than chance, and not shown to be right more often than guessing"),
        ("none", "No better than guessing, as far as these rows show; more labelled rows may help"),
        ("unknown", "Unknown, since there are too few rows to say"),
    ):
        if skills[kind]:
            lines.append(f"{words}: {first_of(skills[kind], most=_MOST_NAMED)}.")
    baselines = [name for name, result in results.items() if result.table[0]["head"] in BASELINES]
    if baselines:
        lines.append(
            "Training did not beat the model's own answer (zero-shot), which is used: "
            f"{first_of(baselines, most=_MOST_NAMED)}."
        )
    means = [
        f"{title} {sum(values) / len(values):.3f}"
        for name, title in (("accuracy", "accuracy"), ("auroc", "AUROC"))
        if (values := [one for result in results.values() if (one := result.estimate[name]["mean"]) is not None])
    ]
    if means and total > 1:
        lines.append(f"Mean of the labels on new rows: {', '.join(means)}.")
    return lines


def _class_lines(record: Mapping[str, Any]) -> list[str]:
    """Say how well one of several classes is chosen."""
    estimate = record["estimate"]
    accuracy = estimate["accuracy"]
    learned = accuracy["low"] > estimate["majority_accuracy"]
    few = ": too few to say how good it is; trust the intervals" if estimate["few"] else ""
    size = f"{estimate['rows']:,} rows in {estimate['groups']:,} groups"
    verdict = "Learned something" if learned else "No better than guessing, as far as these rows show"
    return [
        f"{verdict}: accuracy {interval_words(accuracy)} on new rows, against {estimate['majority_accuracy']:.3f} for "
        f'always "{estimate["majority_class"]}".',
        f"Macro-F1 {interval_words(estimate['macro_f1'])}, log loss {interval_words(estimate['log_loss'])}, against "
        f"{estimate['prior_log_loss']:.3f} for the shares of the classes; 95 % intervals by {estimate['method']}, "
        f"{size}{few}.",
        f"Probabilities of the classes sum to 1, by a temperature of {record['temperature']:.3g}; log loss "
        f"{record['log_loss_before']:.4f} before and {record['log_loss_after']:.4f} after, on rows that it was not "
        "fitted on.",
    ]


def _notes(results: Mapping[str, TrainResult]) -> list[str]:
    """Return the notes of all labels, each once, with the labels that have it where not all do."""
    names: dict[str, list[str]] = {}
    for name, result in results.items():
        for note in result.classifier.training["notes"]:
            names.setdefault(note, []).append(name)
    return [
        note if len(of) == len(results) else f"{first_of(of, most=_MOST_NAMED)}: {note}" for note, of in names.items()
    ]


def _cells(row: tuple[str, TrainResult]) -> list[str]:
    """Return a label's line of the table."""
    name, result = row
    estimate, classifier = result.estimate, result.classifier
    share = estimate["majority_accuracy"] if estimate["majority_class"] else 1 - estimate["majority_accuracy"]
    accuracy, area = estimate["accuracy"], estimate["auroc"]["mean"]
    known = accuracy["mean"] is not None
    return [
        name,
        f"{classifier.training['training_rows']:,}",
        f"{share:.0%}",
        f"{accuracy['mean']:.3f} ({accuracy['low']:.3f}-{accuracy['high']:.3f})" if known else "unknown",
        "" if area is None else f"{area:.3f}",
        str(classifier.tap),
        result.table[0]["head"],
    ]


def _area(result: TrainResult) -> float:
    area = result.estimate["auroc"]["mean"]
    return -math.inf if area is None else float(area)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
