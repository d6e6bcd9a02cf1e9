"""Options of `score`, which `extract` shares where it runs in workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_vl_classifier.config.fields import check_choices, check_not_negative, check_positive, most_errors, option

ENGINES = ("local", "ray")
"""What runs the workers that score."""

SCORE_FORMATS = ("parquet", "jsonl", "csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """How a large data set is scored.

    Raises:
        ConfigError: A value is out of its range.
    """

    shard_size: int = option(1000, "rows in one output file")
    format: str = option("parquet", "what shards are written as", choices=SCORE_FORMATS)
    engine: str = option("local", "where workers run: this machine, or a Ray cluster (extra scale)", choices=ENGINES)
    workers: int = option(0, "worker processes; 0 takes one for each GPU, or one where there is none")
    threads: int = option(0, "threads of each worker on the CPU; 0 shares out the cores")
    group_by_image: bool = option(False, "never part neighbouring rows of one picture by the end of a shard")
    max_errors: str = option("", "stop once more rows than this have errors: a number, or a share such as 5%%")
    features: str = option("", "keep features in this folder; what is kept is never computed again")
    token_budget: int = option(0, "most tokens in one batch; 0 chooses by free memory once, and keeps to it")
    url_hosts: str = option("", "hosts from which pictures may be fetched, such as example.com,cdn.example.com")
    ray_address: str = option("", "address of the Ray cluster; empty starts one on this machine")
    gpus_per_worker: float = option(0.0, "GPUs of each Ray worker; 0 runs on CPUs")
    dry_run: bool = option(False, "score a sample, and say how long all would take; write nothing")

    def __post_init__(self) -> None:
        check_positive(self, "shard_size")
        check_not_negative(self, "workers", "threads", "token_budget", "gpus_per_worker")
        check_choices(self)
        self.most_errors(0)

    def most_errors(self, rows: int) -> float:
        """Return how many of so many rows may have errors; infinity where any number may."""
        return most_errors(self.max_errors, rows, empty=math.inf)
