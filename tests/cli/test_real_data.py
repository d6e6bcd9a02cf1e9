"""Real, human-made data goes the whole way, a few rows of each set; docs/results.md has the whole sets."""

from __future__ import annotations

import json

import pytest

from qwen_vl_classifier.cli.main import main


@pytest.mark.parametrize("name", ["nlvr", "grocery", "coffee", "pneumonia", "easyvqa_tiny"])
def test_train_and_evaluate(shared_data, tmp_path, name):
    folder = shared_data(name)
    classifier, report = tmp_path / "classifier", tmp_path / "report"
    trained = ["--out", str(classifier), "--limit", "60", "--epochs", "2", "--max-pixels", "50176"]
    assert main(["train", str(folder / "train.jsonl"), *trained]) == 0
    assert main(["evaluate", str(classifier), str(folder / "dev.jsonl"), "--out", str(report), "--limit", "30"]) == 0
    evaluation = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["metrics"]["rows"] == 30
    assert all(0 <= row["probability"] <= 1 for row in evaluation["predictions"])
