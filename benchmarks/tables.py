"""What benchmarks share: accuracy with its error, and tables between marks in the documents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from qwen_vl_classifier import Classifier, Example

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
BUILTIN_PAGE = DOCUMENTS / "figures" / "builtin.md"
PERFORMANCE_PAGE = DOCUMENTS / "figures" / "performance.md"
SCALE_PAGE = DOCUMENTS / "how-to" / "scale.md"


def accuracy(classifier: Classifier, rows: list[Example]) -> float:
    """Return the share of right answers."""
    return float(np.mean(classifier.predict(rows) == [row.label for row in rows]))


def with_error(value: float, rows: int) -> str:
    """Write a share with its standard error."""
    return f"{value:.3f} ± {math.sqrt(value * (1 - value) / rows):.3f}"


def put_table(document: Path, part: str, lines: list[str]) -> None:
    """Replace what stands between the marks of a part in a document."""
    begin, end = f"<!-- {part} begins -->\n", f"<!-- {part} ends -->\n"
    text = document.read_text(encoding="utf-8")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    document.write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")
