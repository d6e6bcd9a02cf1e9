"""Real, human-made data goes the whole way, a few rows of each set; docs/figures/results.md has the whole sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vl_classifier.cli.main import main


def few_rows(source: Path, out: Path, count: int) -> Path:
    """Write some rows from all over a data set, for sets are sorted by label, and return the file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: len(lines) // count]]
    for row in rows:
        row["image"] = str(source.parent / row["image"])
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.mark.parametrize("name", ["nlvr", "grocery", "coffee", "pneumonia", "easyvqa_tiny"])
def test_train_and_evaluate(shared_data, tmp_path, blank_plots, name):
    folder = shared_data(name)
    data = {part: few_rows(folder / f"{part}.jsonl", tmp_path / f"{part}.jsonl", 30) for part in ("train", "dev")}
    classifier, report = tmp_path / "classifier", tmp_path / "report"
    options = ["--allow-outside", "--out"]
    training = ["--epochs", "2", "--max-pixels", "50176", "--taps", "mean:-1,last:2"]
    assert main(["train", str(data["train"]), *options, str(classifier), *training]) == 0
    assert main(["evaluate", str(classifier), str(data["dev"]), *options, str(report)]) == 0
    evaluation = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["rows"]["total"] >= 30
    assert all(0 <= row["probability"] <= 1 for row in evaluation["predictions"])
