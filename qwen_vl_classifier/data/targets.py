"""Labels as numbers: the class of every row, or its probability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError

_SOFT_BOUNDARY = 0.5  # a soft label from which a row counts as class 1


def labels_of(examples: Sequence[Example], *, what: str, both: bool = True) -> npt.NDArray[np.int64]:
    """Return the labels, shape (n,), all 0 or 1; otherwise as `targets_of`."""
    return targets_of(examples, what=what, soft=False, both=both).astype(np.int64)


def targets_of(
    examples: Sequence[Example], *, what: str, soft: bool = True, both: bool = True
) -> npt.NDArray[np.float64]:
    """Return the probability of class 1 that each label stands for, shape (n,).

    Args:
        examples: Labelled examples.
        what: What they are for, for messages, such as "training".
        soft: Whether labels between 0 and 1 are allowed.
        both: Whether both classes must occur; of soft labels, on both sides of 0.5.

    Raises:
        DataError: There are none, a label is missing or out of range, or only one class occurs.
    """
    if not examples:
        raise DataError(f"no {what} examples: give at least {'two of each class' if both else 'one'}")
    expected = "a number from 0 to 1" if soft else "0 or 1"
    labels = [example.label for example in examples]
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(examples)} {what} examples have no label, the first is row {missing[0]}; give "
            f"{expected} in every row"
        )
    for row, label in enumerate(labels):
        if not _is_label(label, soft):
            hint = "; soft labels are for training only" if _is_label(label, True) else ""
            raise DataError(
                f"label {label!r} among the {what} examples, in row {row}; give {expected} in every row{hint}"
            )
    targets = np.array(labels, dtype=np.float64)
    if both and len(np.unique(classes_of(targets))) == 1:
        raise DataError(f"all {len(targets)} {what} examples have label {labels[0]}; give examples of both classes")
    return targets


def classes_of(targets: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the class that each soft label is nearer to, shape (n,)."""
    return (targets >= _SOFT_BOUNDARY).astype(np.int64)


def _is_label(label: object, soft: bool) -> bool:
    return bool(0 <= label <= 1) if soft and isinstance(label, (int, float)) else label in (0, 1)
