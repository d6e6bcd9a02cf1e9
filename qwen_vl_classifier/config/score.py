"""Options of `score`, which `extract` shares where it runs in workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_vl_classifier.config.fields import (
    FEATURES_HELP,
    URL_HOSTS_HELP,
    check_choices,
    check_not_negative,
    check_positive,
    most_errors,
    option,
    split_list,
)

ENGINES = ("local", "ray")
"""Where workers run."""

SCORE_FORMATS = ("parquet", "jsonl", "csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """Options of scoring a large data set.

    Raises:
        ConfigError: A value is out of its range.
    """

    shard_size: int = option(1000, "rows in one output file", metavar="ROWS")
    format: str = option("parquet", "format of the output files", choices=SCORE_FORMATS)
    columns: str = option(
        "", "columns of the data that the output repeats as text, such as image,text (default: none)", metavar="NAMES"
    )
    engine: str = option(
        "local",
        "where workers run: this machine, or a Ray cluster (extra: scale)",
        choices=ENGINES,
        section="workers",
        rare=True,
    )
    workers: int = option(
        0, "worker processes; 0 means one for each GPU, or one without a GPU", metavar="PROCESSES", section="workers"
    )
    threads: int = option(
        0,
        "CPU threads of each worker; 0 divides the cores among the workers",
        metavar="THREADS",
        section="workers",
        rare=True,
    )
    group_by_image: bool = option(False, "keep consecutive rows about the same image in one shard", rare=True)
    max_errors: str = option(
        "",
        "stop when more rows than this have errors: a number, or a percentage such as 5%% (default: never)",
        metavar="ROWS",
    )
    features: str = option("", FEATURES_HELP, metavar="FOLDER", rare=True)
    token_budget: int = option(
        0,
        "largest batch; 0 chooses it by free memory when a run starts, and keeps it when the run resumes",
        metavar="TOKENS",
        section="workers",
        rare=True,
    )
    url_hosts: str = option("", URL_HOSTS_HELP)
    ray_address: str = option(
        "",
        "address of the Ray cluster (default: start one on this machine)",
        metavar="ADDRESS",
        section="workers",
        rare=True,
    )
    gpus_per_worker: float = option(
        0.0, "GPUs of each Ray worker; 0 means CPU only", metavar="GPUS", section="workers", rare=True
    )
    escape_formulas: bool = option(
        True, "in CSV, put ' before texts that a spreadsheet would take for a formula (=, +, -, @)", rare=True
    )
    verify: bool = option(
        False,
        "on resume, check the digest of finished shards in an object store too, not only their size (shards in a "
        "folder are always checked)",
        rare=True,
    )
    decode_timeout: float = option(
        5.0,
        "longest processor time that decoding one picture may take",
        metavar="SECONDS",
        section="workers",
        rare=True,
    )
    stall_timeout: float = option(
        600.0,
        "replace a worker that has made no progress for this long",
        metavar="SECONDS",
        section="workers",
        rare=True,
    )
    grace: float = option(
        30.0, "time to finish shards that have begun, after SIGTERM", metavar="SECONDS", section="workers", rare=True
    )
    dry_run: bool = option(False, "score a sample, estimate how long all rows would take, and write nothing")

    def __post_init__(self) -> None:
        check_positive(self, "shard_size", "decode_timeout", "stall_timeout", "grace")
        check_not_negative(self, "workers", "threads", "token_budget", "gpus_per_worker")
        check_choices(self)
        self.most_errors(0)

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns of the data that the output repeats."""
        return split_list(self.columns)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts from which pictures may be fetched, in order of name."""
        return tuple(sorted(split_list(self.url_hosts)))

    def most_errors(self, rows: int) -> float:
        """Return how many rows of a data set may have errors: infinity if there is no limit."""
        return most_errors(self.max_errors, rows, empty=math.inf)
