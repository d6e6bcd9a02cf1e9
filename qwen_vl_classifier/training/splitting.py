"""Splitting labelled examples without letting one picture or group into both parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError

_FEWEST_OF_A_CLASS = 2


def labels_of(examples: Sequence[Example], *, what: str) -> npt.NDArray[np.int64]:
    """Return the labels, shape (n,).

    Args:
        examples: Labelled examples.
        what: What they are for, for messages.

    Raises:
        DataError: There are none, a label is missing, or only one class occurs.
    """
    if not examples:
        raise DataError(f"no {what} examples: give at least {_FEWEST_OF_A_CLASS} of each class")
    missing = sum(example.label is None for example in examples)
    if missing:
        raise DataError(f"{missing} of {len(examples)} {what} examples have no label; give 0 or 1 in every row")
    labels = np.array([example.label for example in examples], dtype=np.int64)
    if labels.min() == labels.max():
        raise DataError(f"all {len(labels)} {what} examples have label {labels[0]}; give examples of both classes")
    return labels


def group_of(example: Example) -> str:
    """Name the group of an example: its `group` column where it has one, else its picture, else itself."""
    group = example.fields.get("group")
    if group is not None:
        return f"group:{group}"
    if not example.images:
        return f"text:{example.text}"
    parts = []
    for source in example.images:
        if isinstance(source, (str, os.PathLike)):
            parts.append(f"path:{os.fspath(source)}")
        elif isinstance(source, bytes):
            parts.append(f"bytes:{hashlib.sha256(source).hexdigest()}")
        else:
            parts.append(f"object:{id(source)}")
    return "|".join(parts)


def holdout(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split into a training and a validation part, stratified by label and whole in groups.

    Args:
        examples: Labelled examples of both classes.
        share: Of the rows, how many to hold out, roughly.
        seed: Of the shuffle.

    Returns:
        The row numbers of the two parts, each in order.

    Raises:
        DataError: Too few rows or groups for both classes to be in both parts.
    """
    labels = labels_of(examples, what="training")
    names: dict[str, int] = {}
    groups = np.array([names.setdefault(group_of(example), len(names)) for example in examples])
    folds = max(2, round(1 / share))
    rarest = int(min(np.bincount(labels, minlength=2)))
    folds = min(folds, rarest, len(names))
    if folds >= _FEWEST_OF_A_CLASS:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train_rows, validation_rows in splitter.split(np.zeros(len(labels)), labels, groups):
            if len({*labels[train_rows]}) == len({*labels[validation_rows]}) == 2:
                return train_rows, validation_rows
    raise DataError(
        f"{len(examples)} training examples in {len(names)} groups, {rarest} of the rarer class: too few to hold some "
        "out with both classes in both parts; give more examples, or a validation file"
    )
