"""Options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_classifier.config.fields import (
    MAX_ERRORS_HELP,
    check_not_negative,
    check_positive,
    group_by_option,
    most_errors,
    option,
    split_list,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """What an evaluation looks at beside the metrics.

    Raises:
        ConfigError: A value is out of its range.
    """

    slice_by: str = option("", "columns to slice by, beside picture size and text length, such as kind,source")
    slice_rows: int = option(20, "fewest rows of a slice", rare=True)
    checks: bool = option(True, "check that it uses picture and text, by scoring again with other ones")
    check_rows: int = option(500, "most rows that the checks score again, drawn at random", rare=True)
    group_by: str = group_by_option("resample together rows that share")
    resamples: int = option(2000, "bootstrap resamples behind the intervals", rare=True)
    max_errors: str = option("", MAX_ERRORS_HELP)
    seed: int = option(0, "seed of the bootstrap and of the checks", rare=True)

    def __post_init__(self) -> None:
        most_errors(self.max_errors, 0)
        check_positive(self, "slice_rows", "check_rows", "resamples")
        check_not_negative(self, "seed")

    @property
    def slice_columns(self) -> tuple[str, ...]:
        """The columns to slice by, each once."""
        return split_list(self.slice_by)
