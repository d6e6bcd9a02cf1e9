"""Plan and score a file with a stub in place of the model, and print time and memory as JSON; see `scoring.py`.

python benchmarks/scoring_memory.py ROWS.jsonl OUT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from qwen_vl_classifier import Backbone, Classifier, score
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.scoring.plan import make_plan


def megabytes() -> float:
    """Return the memory of this process that is in use."""
    return float(psutil.Process().memory_info().rss) / 1e6


def stub(backbone: Backbone, prepared: Sequence[object], taps: Sequence[object], **_: Any) -> npt.NDArray[np.float32]:
    """Return constant features."""
    return np.full((len(prepared), len(taps), backbone.hidden_size), 0.5, dtype=np.float32)


def main() -> None:
    """Measure and print."""
    data, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu", dtype="float32"))
    classifier.predict_proba([])  # what is imported late is imported now
    before, started = megabytes(), time.perf_counter()
    plan = make_plan(data, Columns("image", "text", "label", "id"), shard_size=1000)
    found = {"plan_seconds": time.perf_counter() - started, "plan_megabytes": megabytes() - before}
    Backbone.encode_prepared = stub  # type: ignore[method-assign, assignment]
    memory: list[float] = []

    def note() -> bool:
        memory.append(megabytes())
        return False

    started = time.perf_counter()
    score(classifier, data, out, progress=False, should_stop=note)
    early = memory[len(memory) // 10]
    found |= {
        "score_seconds": time.perf_counter() - started,
        "early_megabytes": early,
        "most_megabytes": max(memory[len(memory) // 10 :]),
        "shards": len(plan),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
