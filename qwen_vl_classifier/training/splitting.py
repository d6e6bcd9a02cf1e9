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
    strange = [example.label for example in examples if example.label not in (0, 1)]
    if strange:
        raise DataError(f"label {strange[0]!r} among the {what} examples; give 0 or 1 in every row")
    labels = np.array([example.label for example in examples], dtype=np.int64)
    if labels.min() == labels.max():
        raise DataError(f"all {len(labels)} {what} examples have label {labels[0]}; give examples of both classes")
    return labels


def groups_of(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """Number the groups of examples, shape (n,).

    Examples are of one group if their `group` column agrees, or, without one, if they share a picture, be it by way
    of others; without pictures, if they are the same text.
    """
    parents: dict[str, str] = {}  # a forest over names of groups and pictures: one tree, one group

    def root(name: str) -> str:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    names = [_names_of(example) for example in examples]
    for first, *others in names:
        for other in others:
            parents[root(other)] = root(first)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(first), len(numbers)) for first, *_ in names], dtype=np.int64)


def _names_of(example: Example) -> list[str]:
    """Name what must not be in both parts of a split: at least one thing."""
    group = example.fields.get("group")
    if group is not None:
        return [f"group:{group}"]
    names = []
    for source in example.images:
        if isinstance(source, (str, os.PathLike)):
            names.append(f"path:{os.fspath(source)}")
        elif isinstance(source, bytes):
            names.append(f"bytes:{hashlib.sha256(source).hexdigest()}")
        else:
            names.append(f"object:{id(source)}")
    return names or [f"text:{example.text}"]


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
    groups = groups_of(examples)
    number = int(groups.max()) + 1
    folds = max(2, round(1 / share))
    rarest = int(min(np.bincount(labels, minlength=2)))
    folds = min(folds, rarest, number)
    if folds >= _FEWEST_OF_A_CLASS:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train_rows, validation_rows in splitter.split(np.zeros(len(labels)), labels, groups):
            if len({*labels[train_rows]}) == len({*labels[validation_rows]}) == 2:
                return train_rows, validation_rows
    raise DataError(
        f"{len(examples)} training examples in {number} groups, {rarest} of the rarer class: too few to hold some "
        "out with both classes in both parts; give more examples, or a validation file"
    )
