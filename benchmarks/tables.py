"""What the benchmarks of the built-in backbone share: accuracy, its error, and the tables of docs/builtin.md."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from qwen_vl_classifier import Classifier, Example

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "builtin.md"


def accuracy(classifier: Classifier, rows: list[Example]) -> float:
    """Return the share of right answers."""
    return float(np.mean(classifier.predict(rows) == [row.label for row in rows]))


def with_error(value: float, rows: int) -> str:
    """Write a share with its standard error."""
    return f"{value:.3f} ± {math.sqrt(value * (1 - value) / rows):.3f}"


def put_table(part: str, lines: list[str]) -> None:
    """Replace a table between its marks in docs/builtin.md."""
    begin, end = f"<!-- {part} begins -->\n", f"<!-- {part} ends -->\n"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    DOCUMENT.write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")
