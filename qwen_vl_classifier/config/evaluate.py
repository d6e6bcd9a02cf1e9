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
    """Options of an evaluation: slices, checks and intervals.

    Raises:
        ConfigError: A value is out of its range.
    """

    slice_by: str = option(
        "", "also measure each value of these columns by itself, such as kind,source", metavar="COLUMNS"
    )
    slice_rows: int = option(20, "smallest slice that is measured", metavar="ROWS", rare=True)
    checks: bool = option(
        True, "check that the classifier uses picture and text, by scoring rows again with other ones"
    )
    check_rows: int = option(
        500, "how many rows, drawn at random, the checks score again at most", metavar="ROWS", rare=True
    )
    group_by: str = group_by_option("rows that are resampled together for the intervals")
    resamples: int = option(
        2000, "bootstrap resamples from which the intervals are computed", metavar="COUNT", rare=True
    )
    max_errors: str = option("", MAX_ERRORS_HELP, metavar="ROWS", rare=True)
    seed: int = option(0, "seed of the bootstrap and the checks", metavar="SEED", rare=True)

    def __post_init__(self) -> None:
        most_errors(self.max_errors, 0)
        check_positive(self, "slice_rows", "check_rows", "resamples")
        check_not_negative(self, "seed")

    @property
    def slice_columns(self) -> tuple[str, ...]:
        """The columns to slice by, each once."""
        return split_list(self.slice_by)
