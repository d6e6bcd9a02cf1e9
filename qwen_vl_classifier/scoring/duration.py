"""What a run would take: a sample is scored against the clock, and nothing is written."""

from __future__ import annotations

import time
from typing import Any

from qwen_vl_classifier.scoring.plan import Plan
from qwen_vl_classifier.scoring.scorer import ShardScorer
from qwen_vl_classifier.scoring.shards import ShardFolder

_SAMPLED_SHARDS = 4
_SAMPLED_ROWS = 64  # of each of them


def estimate(scorer: ShardScorer, folder: ShardFolder, plan: Plan, *, workers: int) -> dict[str, Any]:
    """Score the first rows of a few shards, spread over the data, and reckon from these.

    Args:
        scorer: What scores.
        folder: Where the scores would go; it need not be there.
        plan: All shards.
        workers: How many there would be, each as fast as `scorer`.

    Returns:
        `rows` and `shards` in the data, `shards_there` already, `workers`, `seconds` that the rest would take, `bytes`
        of all shards together, `errors` as a share of the rows sampled, and `rows_sampled`.
    """
    there, rows_there, _ = folder.survey(plan)
    empty = folder.size_of([])
    chosen = range(0, len(plan), max(1, len(plan) // _SAMPLED_SHARDS))[:_SAMPLED_SHARDS]
    scorer.probe(plan[0], range(1))  # loads the model, whose first pass is slow
    rows = size = errors = 0
    seconds = 0.0
    for shard in (plan[index] for index in chosen):
        started = time.perf_counter()
        scored = scorer.probe(shard, range(min(shard.rows, _SAMPLED_ROWS)))
        seconds += time.perf_counter() - started
        rows += len(scored)
        size += folder.size_of(scored) - empty
        errors += sum(row.error is not None for row in scored)
    return {
        "rows": plan.rows,
        "shards": len(plan),
        "shards_there": sum(there),
        "workers": workers,
        "seconds": (plan.rows - rows_there) * seconds / rows / workers,
        "bytes": round(len(plan) * empty + plan.rows * size / rows),
        "errors": errors / rows,
        "rows_sampled": rows,
    }
