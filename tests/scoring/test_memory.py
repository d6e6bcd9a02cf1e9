"""Memory does not grow with the number of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import numpy as np
import psutil
from qwen_vl_classifier import Backbone, Classifier, ScoreConfig, score

def encode(self, prepared, taps, **options):
    return np.zeros((len(prepared), len(taps), self.hidden_size), dtype=np.float32)

def rss():
    return psutil.Process().memory_info().rss

Backbone.encode_prepared = encode
classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu"))
score(classifier, [{"image": None, "text": "warm up"}] * 500, sys.argv[2] + "-first", progress=False)
module = sys.modules["qwen_vl_classifier.scoring.run"]
make_plan, found = module.make_plan, {}

def measured(*arguments, **options):
    found["before"] = rss()
    plan = make_plan(*arguments, **options)
    found["planned"] = rss()
    return plan

module.make_plan = measured
found["summary"] = score(classifier, sys.argv[1], sys.argv[2], progress=False)
found["after"] = rss()
print(json.dumps(found))
"""


def score_many(fresh, folder: Path, rows: int) -> dict:
    """Score rows in a process of its own, with a backbone that computes nothing; say what it took."""
    data = folder / "rows.jsonl"
    with data.open("w") as file:
        file.writelines(f'{{"id": "row {row}", "image": null, "text": "Text {row}."}}\n' for row in range(rows))
    run = fresh.run(SCRIPT, data, folder / "out")
    assert run.returncode == 0, run.stderr
    found: dict = json.loads(run.stdout)
    assert found["summary"]["rows"] == rows
    assert found["summary"]["errors"] == 0
    return found


def test_ten_thousand_rows_in_constant_memory(tmp_path, fresh):
    found = score_many(fresh, tmp_path, 10_000)
    assert found["after"] - found["before"] < 40_000_000
    assert found["summary"]["shards_written"] == 10


@pytest.mark.soak
def test_a_million_rows_in_constant_memory(tmp_path, fresh):
    found = score_many(fresh, tmp_path, 1_000_000)
    assert found["planned"] - found["before"] < 200_000_000
    assert found["after"] - found["before"] < 200_000_000
