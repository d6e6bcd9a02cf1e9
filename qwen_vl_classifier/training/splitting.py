"""Split labelled examples without letting one picture or group into both parts."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.targets import classes_of, targets_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.images.identity import picture_identities

RowNumbers: TypeAlias = npt.NDArray[np.int64]

Folds: TypeAlias = Sequence[tuple[RowNumbers, RowNumbers]]
"""For each fold the rows to train on and the rows held out."""

GROUPINGS = ("image", "text", "both")
"""What rows of one group may share, beside their value in a column."""

_FEWEST_FOLDS = 2
_MOST_CROSSED = 4  # parts in each direction: a fold is trained on about 9 of 16 rows
_FEWEST_GROUPS = 3  # by "both": the largest group may hold at most a third of the rows


def groups_of(
    examples: Sequence[Example], by: str = "image", *, pictures: Sequence[Sequence[bytes]] | None = None
) -> RowNumbers:
    """Number the groups of examples, shape (n,).

    Examples are of one group if they share one of the things that `by` says, be it by way of others; with none of
    these, if they are the same text. A cell of the column that is missing or blank joins nothing.

    Args:
        examples: Any.
        by: "image": a picture, or the value in the column `group`; "text": the text; "both": any of these. Else the
            name of a column in place of `group`, beside pictures.
        pictures: The identities of each example's pictures, where they are known.
    """
    parents: dict[object, object] = {}  # a forest over what is shared: one tree, one group

    def root(name: object) -> object:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    if pictures is None:
        pictures = (
            [()] * len(examples)
            if by == "text"
            else picture_identities([example.images for example in examples], lenient=True)
        )
    names = [_names_of(example, known, by) for example, known in zip(examples, pictures, strict=True)]
    for first, *others in names:
        for other in others:
            parents[root(other)] = root(first)
    found: dict[object, int] = {}
    return np.array([found.setdefault(root(first), len(found)) for first, *_ in names], dtype=np.int64)


def grouping_of(
    examples: Sequence[Example], by: str, *, pictures: Sequence[Sequence[bytes]] | None = None
) -> tuple[RowNumbers, RowNumbers | None]:
    """Number the groups of examples as `groups_of` does, where these can be split.

    Where the same texts come with most pictures, nearly all rows are one group by "both". Then groups by picture and
    groups by text are returned apart, the fewer first, and folds have to be whole in each of them.

    Returns:
        Numbers of groups, and of other groups or `None`, each of shape (n,).
    """
    groups = groups_of(examples, by, pictures=pictures)
    if by != "both" or np.bincount(groups).max() * _FEWEST_GROUPS <= len(groups):
        return groups, None
    first, second = sorted((groups_of(examples, one, pictures=pictures) for one in ("text", "image")), key=np.max)
    return first, second


def check_grouping(examples: Sequence[Example], by: str) -> None:
    """Refuse a grouping that these examples do not have, before any pass.

    Raises:
        DataError: No row has such a column, or all rows have the same text.
    """
    if by == "text" and len({text_key(example.text) for example in examples}) == 1:
        raise DataError(
            f"all {len(examples)} rows have the same text; expected several texts for {spelled('group_by', 'text')}; "
            f"leave it out to split by picture"
        )
    if by in GROUPINGS or any(group_value(example.fields.get(by)) is not None for example in examples):
        return
    columns = sorted({str(column) for example in examples for column in example.fields})
    raise DataError(
        f"{spelled('group_by', by)}: no row has a value in such a column; expected image, text, both or a column of "
        f"the data: {', '.join(columns[:20]) or 'there are no others'}"
    )


def _names_of(example: Example, pictures: Sequence[bytes], by: str) -> list[object]:
    """Name what must not be in both parts of a split: at least one thing."""
    names: list[object] = []
    if by != "text":
        group = group_value(example.fields.get("group" if by in GROUPINGS else by))
        names += [] if group is None else [("group", *group)]
        names += [("picture", picture) for picture in pictures]
    if by in ("text", "both") or not names:
        names.append(("text", text_key(example.text)))
    return names


def text_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in spaces."""
    return " ".join(text.split())


def group_value(cell: object) -> tuple[str, object] | None:
    """Return a key that is equal for cells that name the same group; `None` for a cell that names none.

    None, NaN and blank texts name no group. Numbers are compared by value, whatever their types, and texts without
    blanks around them; a number and a text are never equal, not even 1 and "1".
    """
    if isinstance(cell, np.generic):
        cell = cell.item()
    if isinstance(cell, str):
        return ("text", cell.strip()) if cell.strip() else None
    if cell is None or type(cell).__name__ in ("NAType", "NaTType") or cell != cell:  # of pandas; not a number
        return None
    if isinstance(cell, bool):
        return "truth", cell
    if isinstance(cell, numbers.Number):
        return "number", cell
    return type(cell).__name__, repr(cell)


def folds(
    classes: npt.NDArray[np.int64], groups: RowNumbers, count: int, seed: int, *, across: RowNumbers | None = None
) -> list[tuple[RowNumbers, RowNumbers]]:
    """Split for cross-validation, stratified by class and whole in groups; every row is held out once.

    Args:
        classes: Shape (n,), 0 or 1.
        groups: Shape (n,): rows of one number stay together.
        count: Of folds, at least 2; fewer are made where the rarer class or the groups are too few.
        seed: Of the shuffle.
        across: Shape (n,): other groups that cross the first. Both are cut into at most 4 parts; each pair of parts is
            held out in turn, and rows that share but one of them with it are left out of training.

    Returns:
        For each fold the rows to train on, which hold both classes, and the rows held out.

    Raises:
        DataError: Not even two folds can be made.
    """
    most = _most_folds(classes, groups, count)
    if across is not None:
        most = min(_MOST_CROSSED, _most_folds(classes, across, most))
    for number in range(most, _FEWEST_FOLDS - 1, -1):
        parts = [*_parts(classes, groups, number, seed)]
        if across is not None:
            parts = _crossed(parts, [*_parts(classes, across, number, seed)])
        if all(len(held) and len({*classes[rows]}) == 2 for rows, held in parts):
            return parts
    raise DataError(f"{_few(classes, groups)}: too few for cross-validation; give more examples in more groups")


def _crossed(parts: Folds, others: Folds) -> list[tuple[RowNumbers, RowNumbers]]:
    """Hold out what two folds hold out together, and train on what both train on."""
    crossed = [
        (np.intersect1d(rows, other_rows), np.intersect1d(held, other_held))
        for rows, held in parts
        for other_rows, other_held in others
    ]
    return [(rows, held) for rows, held in crossed if len(held)]


def holdout(
    examples: Sequence[Example], share: float, seed: int, *, soft: bool = False, by: str = "image"
) -> tuple[RowNumbers, RowNumbers]:
    """Split into a training and a validation part, stratified by label and whole in groups.

    Args:
        examples: Labelled examples of both classes.
        share: Of the rows, how many to hold out, roughly.
        seed: Of the shuffle.
        soft: Whether labels between 0 and 1 are allowed.
        by: What rows of one group share, as in `groups_of`.

    Returns:
        The row numbers of the two parts, each in order.

    Raises:
        DataError: Too few rows or groups for both classes to be in both parts.
    """
    classes = classes_of(targets_of(examples, what="training", soft=soft))
    groups = groups_of(examples, by)
    number = _most_folds(classes, groups, max(2, round(1 / share)))
    if number >= _FEWEST_FOLDS:
        for train_rows, validation_rows in _parts(classes, groups, number, seed):
            if len({*classes[train_rows]}) == len({*classes[validation_rows]}) == 2:
                return train_rows, validation_rows
    raise DataError(
        f"{_few(classes, groups)}: too few to hold some out with both classes in both parts; give more examples, or "
        "a validation file"
    )


def _most_folds(classes: npt.NDArray[np.int64], groups: RowNumbers, count: int) -> int:
    return min(count, int(np.bincount(classes, minlength=2).min()), len(np.unique(groups)))


def _parts(
    classes: npt.NDArray[np.int64], groups: RowNumbers, number: int, seed: int
) -> Iterator[tuple[RowNumbers, RowNumbers]]:
    splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    yield from splitter.split(np.zeros(len(classes)), classes, groups)


def _few(classes: npt.NDArray[np.int64], groups: RowNumbers) -> str:
    rarest = int(np.bincount(classes, minlength=2).min())
    return f"{len(classes)} training examples in {len(np.unique(groups))} groups, {rarest} of the rarer class"
