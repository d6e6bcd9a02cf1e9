"""What `train` found, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.model_card import accuracy_text
from qwen_vl_classifier.files.html_pieces import fact_card, row_table

_SHOWN_ROWS = 15
_SMALLEST_COST = 0.00005  # log losses are printed with four decimals
_BASELINES = ("zero-shot", "calibrated")
_METHODS = {"temperature": "a temperature", "isotonic": "an isotonic curve", "platt": "a scale and a bias"}
_MEASURES = (("accuracy", "accuracy"), ("log_loss", "log loss"), ("auroc", "AUROC"), ("ece", "calibration error"))
_TRAINED = {"zero-shot": "measured", "calibrated": "fitted"}


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
        return "\n".join([*table_lines(self.table), "", *summary_lines(self.classifier.training)])

    def __repr__(self) -> str:
        best, accuracy = self.table[0], accuracy_text(self.estimate)
        found = f"{best['head']} at {best['tap']}" + (f", {accuracy} on new rows" if accuracy else "")
        return f"<TrainResult: {found}, best of {len(self.table)} tried>"

    def _repr_html_(self) -> str:
        """Return the summary and the table, for notebooks."""
        shown = _shown_rows(self.table)
        left_out = len(self.table) - len(shown)
        notes = [f"and {left_out} more, in the training record"] if left_out else []
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
        summary = fact_card("What train found", {}, summary_lines(self.classifier.training))
        return summary + row_table(columns, cells, numbers=(2, 3, 4), notes=notes)


def table_lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """Lay the first rows of a table out in columns, and the baselines wherever they stand."""
    shown = _shown_rows(table)
    width = max(10, *(len(row["tap"]) for row in shown))
    lines = [f"{'tap':<{width}} {'head':<10} {'log loss ± s.e.':>16} {'accuracy ± s.e.':>16} {'AUROC':>7}  setting"]
    for row in shown:
        scores = " ".join(f"{row[name]:>7.4f} ± {row[f'{name}_se']:.4f}" for name in ("log_loss", "accuracy"))
        lines.append(f"{row['tap']:<{width}} {row['head']:<10} {scores} {row['auroc']:>7.4f}  {_setting(row)}".rstrip())
    if len(shown) < len(table):
        lines.append(f"and {len(table) - len(shown)} more, in the training record")
    return lines


def _shown_rows(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for number, row in enumerate(table) if number < _SHOWN_ROWS or row["head"] in _BASELINES]


def _setting(row: dict[str, Any]) -> str:
    if row["l2"] is not None:
        return f"l2 {row['l2']:.3g}"
    return "" if row["epochs"] is None else f"{row['epochs']} epochs"


def summary_lines(record: dict[str, Any]) -> list[str]:
    """Say in words what a training record knows of the classifier: how good, how sure, how calibrated."""
    estimate, calibration, threshold = (record[name] for name in ("estimate", "calibration", "threshold"))
    chosen = record["table"][0]
    lines = [
        f"kept {chosen['head']} at {chosen['tap']}, {_TRAINED.get(chosen['head'], 'trained')} on all "
        f"{record['training_rows']} rows",
        *_exportable_lines(record),
        *_data_lines(record),
        *_estimate_lines(estimate),
        *_new_texts_lines(record),
        _calibration_line(calibration),
        f"threshold {threshold['threshold']:.3f} for {threshold['objective']}",
    ]
    abstention = record.get("abstention")
    if abstention:
        low, high = abstention["band"]
        lines.append(
            f"abstains from {low:.3f} to {high:.3f}: {abstention['decided']:.1%} of {abstention['rows']} held-out rows "
            f"are decided; {abstention['guarantee']}"
        )
    return lines + [f"note: {note}" for note in record["notes"]]


def _exportable_lines(record: dict[str, Any]) -> list[str]:
    """Say what it costs that the classifier can be exported, where it was trained to be."""
    exportable = record.get("exportable")
    if not exportable:
        return []
    other = exportable["unrestricted"]
    cost = exportable["log_loss"] - other["log_loss"]
    if cost < _SMALLEST_COST:
        return ["can be exported, which costs nothing: no other tap or head has a lower log loss"]
    return [
        f"can be exported, which costs {cost:.4f} of log loss: {other['head']} at {other['tap']}, which cannot, has "
        f"{other['log_loss']:.4f} out of fold, this one {exportable['log_loss']:.4f}"
    ]


def _data_lines(record: dict[str, Any]) -> list[str]:
    """Say what the rows hold, and which pictures are on both sides of splits without being known as the same."""
    data = record["data"]
    counted = [
        f"{data[what]:,} distinct {what.removesuffix('s') if data[what] == 1 else what}"
        for what in ("pictures", "texts")
        if data[what]
    ]
    lines = [f"{record['training_rows']:,} rows: {', '.join(counted)}"]
    if data["alike"]["pairs"]:
        lines.append(
            "  pairs of pictures in different groups that look alike (compressed again, resized, or just similar): "
            f"{data['alike']['pairs']:,}; give those that belong together one value in a column group"
        )
    return lines


def _new_texts_lines(record: dict[str, Any]) -> list[str]:
    """Tell what to expect of texts that were not trained on, where that was measured."""
    estimate = record.get("estimate_new_texts")
    return _estimate_lines(estimate, "where texts are new too") if estimate else []


def _calibration_line(calibration: dict[str, Any]) -> str:
    if calibration["method"] == "none":
        line = f"calibration: none, log loss {calibration['log_loss_before']:.4f}"
        worse = [
            f"{loss:.4f} with {_METHODS[method]}" for method, loss in calibration["tried"].items() if method != "none"
        ]
        return f"{line}; on rows that it was not fitted on {', '.join(worse)}" if worse else line
    return (
        f"calibration: {_METHODS[calibration['method']]}; on rows that it was not fitted on, log loss "
        f"{calibration['log_loss_before']:.4f} before, {calibration['log_loss_after']:.4f} after"
    )


def _estimate_lines(estimate: dict[str, Any], where: str = "on new rows") -> list[str]:
    size = f"{estimate['rows']} rows in {estimate['groups']} groups"
    if not estimate["samples"]:
        return [f"{where}: unknown; {size}: too few to say"]
    words = []
    for name, title in _MEASURES:
        value = estimate[name]
        if value["mean"] is not None:
            words.append(f"{title} {value['mean']:.3f} (95 %: {value['low']:.3f} to {value['high']:.3f})")
    majority, low = estimate["majority_accuracy"], estimate["accuracy"]["low"]
    lines = [
        f"{where}: {', '.join(words)}",
        f"  this stands for {estimate['stands_for']}",
        f"  by {estimate['method']}, {size}; {'better than' if low > majority else 'not shown to be better than'} "
        f"always the majority class: {majority:.3f}",
    ]
    return [*lines, f"  {size}: too few to say how good it is; trust the intervals"] if estimate["few"] else lines
