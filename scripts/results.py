"""Measure what docs/results.md shows: train and evaluate on real data sets with the command line.

    python scripts/results.py --data FOLDER            # prints the table
    python scripts/results.py --data FOLDER --write    # and puts it into docs/results.md

FOLDER holds one folder for each data set, with train.jsonl and dev.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETS = ("nlvr", "grocery", "coffee", "pneumonia", "easyvqa_tiny")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- table begins -->\n", "<!-- table ends -->\n"


def run(*arguments: str | Path) -> None:
    """Run one verb of the command line and show what it prints."""
    command = [sys.executable, "-m", "qwen_vl_classifier", *map(str, arguments)]
    subprocess.run(command, check=True)  # noqa: S603  # our own command line


def measure(folder: Path, work: Path, model: str) -> dict[str, Any]:
    """Train on one set's train rows, evaluate on its dev rows."""
    started = time.monotonic()
    classifier, report, features = (work / name for name in ("classifier", "report", "features"))
    run("train", folder / "train.jsonl", "--model", model, "--out", classifier, "--features", features)
    run("evaluate", classifier, folder / "dev.jsonl", "--out", report, "--features", features)
    evaluation = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
    return {
        **evaluation["metrics"],
        "set": folder.name,
        "tap": evaluation["classifier"]["tap"],
        "training_rows": sum(1 for _ in (folder / "train.jsonl").open(encoding="utf-8")),
        "seconds": time.monotonic() - started,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Lay the measurements out in Markdown."""
    lines = [
        "| set | train rows | dev rows | majority | accuracy ± s.e. | F1 | AUROC | log loss | tap | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["rows"])
        lines.append(
            f"| {row['set']} | {row['training_rows']} | {row['rows']} | {row['majority_accuracy']:.3f} "
            f"| {row['accuracy']:.3f} ± {error:.3f} | {row['f1']:.3f} | {row['auroc']:.3f} | {row['log_loss']:.3f} "
            f"| `{row['tap']}` | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", default=SETS, help="which sets (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    options = parser.parse_args()
    rows = []
    for name in options.sets:
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            rows.append(measure(options.data / name, Path(work), options.model))
    print(table(rows))
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        DOCUMENT.write_text(text[:before] + table(rows) + text[after:], encoding="utf-8")


if __name__ == "__main__":
    main()
