"""Find the rows that were drawn at random, among others that were chosen: an unbiased estimate needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.probe.fitting import FeatureRows

RANDOM = "random"
"""What the column says of a row that was drawn at random; any other word means that it was chosen."""

FEWEST_GROUPS = 10
"""Groups of rows drawn at random; with fewer, an interval says nothing."""


def random_rows(examples: Sequence[Example], column: str) -> npt.NDArray[np.bool_] | None:
    """Return which rows were drawn at random, shape (n,), or `None` if no column says how rows were chosen.

    Args:
        examples: Whose `fields` hold the column.
        column: Its name; empty for none.

    Raises:
        DataError: No row has such a column.
    """
    if not column:
        return None
    if examples and not any(column in example.fields for example in examples):
        raise DataError(
            f"no row has a column {column!r}; expected the column that says {RANDOM!r} of rows drawn at random; name "
            f"it with {spelled('sampled_column')}, or leave it out to measure on all rows"
        )
    return np.array([example.fields.get(column) == RANDOM for example in examples], dtype=np.bool_)


def check_random_rows(rows: FeatureRows, config: TrainConfig, *, validated: bool) -> tuple[FeatureRows, list[str]]:
    """Make sure that the rows drawn at random suffice for an estimate; else let all rows be measured, with a note.

    Args:
        rows: The rows to train on.
        config: Options.
        validated: Whether rows of their own are there to measure on.

    Returns:
        The rows, and notes for the user.
    """
    if rows.measured is None:
        return rows, []
    if validated:
        return replace(rows, measured=None), [
            f"{spelled('sampled_column', config.sampled_column)} has no effect with validation rows"
        ]
    notes = []
    if config.target_error_rate:
        notes.append(
            "where predictions become abstain was set on rows of every kind, of which the chosen ones are harder"
        )
    classes, groups = classes_of(rows.targets[rows.measured]), np.unique(rows.groups[rows.measured])
    if len(groups) >= FEWEST_GROUPS and len(np.unique(classes)) == 2:
        return rows, notes
    found = f"{len(classes):,} rows drawn at random in {len(groups):,} groups"
    return replace(rows, measured=None), [
        *notes,
        f"the estimate is from all rows: {found} are too few, or of one class. The other rows were chosen and may be "
        f"harder than new ones, so it may mislead; label {FEWEST_GROUPS} random rows or more, of both classes",
    ]
