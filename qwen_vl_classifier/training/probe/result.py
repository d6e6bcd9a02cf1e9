"""The result of `train`, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.model_card import accuracy_text
from qwen_vl_classifier.files.html_pieces import fact_card, row_table
from qwen_vl_classifier.training.probe.outcome import (
    BASELINES,
    choice_lines,
    choice_text,
    verdict_lines,
    verdict_text,
)

_SHOWN_ROWS = 6  # and the baselines


@dataclass(frozen=True, slots=True, repr=False)
class TrainResult:
    """What `train` found.

    Attributes:
        classifier: The best one, trained on all rows.
        table: Every tap and head tried, best first: tap, head, log_loss, log_loss_se, accuracy, accuracy_se, auroc (out
            of fold, before calibration), l2 and epochs.
        validation_rows: Number of rows that were held out of the search; 0 where all were used.
        estimate: How good the classifier will be on new rows, with the choice paid for: for each of accuracy, log_loss
            and auroc an object of mean, low and high, the ends of its 95 % interval; and how that is known.
    """

    classifier: Classifier
    table: list[dict[str, Any]]
    validation_rows: int
    estimate: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [verdict_text(self.classifier), choice_text(self.classifier), "\n".join(table_lines(self.table))]
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        best, accuracy = self.table[0], accuracy_text(self.estimate)
        found = f"{best['head']} at {best['tap']}" + (f", {accuracy} on new rows" if accuracy else "")
        return f"<TrainResult: {found}, best of {len(self.table)} tried>"

    def _repr_html_(self) -> str:
        """Return the summary and the table, for notebooks."""
        shown = _shown_rows(self.table)
        left_out = len(self.table) - len(shown)
        notes = [f"and {left_out} more in the training record"] if left_out else []
        cells = [
            [
                row["tap"],
                row["head"],
                *(f"{row[name]:.4f} ± {row[f'{name}_se']:.4f}" for name in ("log_loss", "accuracy")),
                f"{row['auroc']:.4f}",
                _setting(row),
            ]
            for row in shown
        ]
        columns = ("tap", "head", "log loss ± s.e.", "accuracy ± s.e.", "AUROC", "setting")
        summary = fact_card("What train found", {}, [*verdict_lines(self.classifier), *choice_lines(self.classifier)])
        return summary + row_table(columns, cells, numbers=(2, 3, 4), notes=notes)


def table_lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """Lay the first rows of a table out in columns, and the baselines wherever they stand."""
    shown = _shown_rows(table)
    width = max(9, *(len(row["tap"]) for row in shown))
    lines = [f"{'tap':<{width}} {'head':<10} {'log loss ± s.e.':>16} {'accuracy ± s.e.':>16} {'AUROC':>7}  setting"]
    for row in shown:
        scores = " ".join(f"{row[name]:>7.4f} ± {row[f'{name}_se']:.4f}" for name in ("log_loss", "accuracy"))
        lines.append(f"{row['tap']:<{width}} {row['head']:<10} {scores} {row['auroc']:>7.4f}  {_setting(row)}".rstrip())
    if len(shown) < len(table):
        lines.append(f"and {len(table) - len(shown)} more in the training record (classifier.json)")
    return lines


def _shown_rows(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for number, row in enumerate(table) if number < _SHOWN_ROWS or row["head"] in BASELINES]


def _setting(row: dict[str, Any]) -> str:
    if row["l2"] is not None:
        return f"l2 {row['l2']:.2g}"
    return "" if row["epochs"] is None else f"{row['epochs']} epochs"
