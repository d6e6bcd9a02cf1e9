"""Labels as numbers: the class of every row, or its probability; of rows with several labels a matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.config.spelling import did_you_mean, spelled
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import Labels, folded, label_text, listed_counts
from qwen_vl_classifier.data.locating import CellError
from qwen_vl_classifier.data.rows import plain_value
from qwen_vl_classifier.data.table import name_in, suggested_column
from qwen_vl_classifier.errors import DataError, first_of, shown

MISSING = -1
"""In a matrix of labels: the row has no value of this label."""

_SOFT_BOUNDARY = 0.5  # a soft label from which a row counts as class 1
_PLAIN_CELLS = {0: 0, 1: 1, "0": 0, "1": 1, "no": 0, "yes": 1, None: MISSING}  # of label columns: nearly all


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


def label_matrix(
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    one_of: bool = False,
    label_column: str = "label",
    bad: BadRows | None = None,
) -> npt.NDArray[np.int64]:
    """Return the labels of rows that have several, from the columns of these names in `Example.fields`.

    A cell is 0, 1, a truth value, or the word no or yes; an empty one is a missing label. Where a row has exactly one
    of the labels and no column has their names, `label_column` holds the name of the one that it has.

    Args:
        examples: At least one.
        names: What the labels are called.
        one_of: Whether a row has exactly one of them. Then empty cells of a row that has one are 0.
        label_column: Column of the class's name; without it, the label of the example, or its word, stands for it.
        bad: Receives the rows whose labels cannot be read, which are all missing then; rows that are in it already are
            skipped. Without it they are an error.

    Returns:
        Shape (n, labels): 1, 0, or -1 where a label is missing.

    Raises:
        DataError: No examples, a column is missing, or cells hold something else; the first ten rows are listed.
    """
    if not examples:
        raise DataError("no rows: give at least one")
    found = np.full((len(examples), len(names)), MISSING, dtype=np.int64)
    problems = BadRows() if bad is None else bad
    columns = {column for example in examples for column in example.fields}
    spelling = [name_in(columns, name) for name in names]
    # In a table with a column for some of the classes, the others are misspelled rather than words.
    in_words = one_of and (columns.isdisjoint(spelling) or label_column in columns)
    in_words = in_words and not columns.issuperset(spelling)
    if not in_words:
        check_label_columns(examples, names)
    words = {_plain_word(name): number for number, name in enumerate(names)}
    reader = Labels(class_names=("no", "yes"))
    for row, example in enumerate(examples):
        if row in problems:
            continue
        try:
            if in_words:
                number = _class_of(example, label_column, words)
                if number is not None:
                    found[row] = np.arange(len(names)) == number
            else:
                found[row] = [
                    _cell(example, column, name, reader) for column, name in zip(spelling, names, strict=True)
                ]
                if one_of:
                    found[row] = _exactly_one(found[row], names)
        except DataError as error:
            found[row] = MISSING
            problems.add(row, example, error)
    if bad is None:
        problems.check(len(examples))
    return found


def class_words(examples: Sequence[Example], label_column: str = "label") -> list[str]:
    """Return the different words in the label column, in order: the classes of which a row has exactly one.

    Args:
        examples: Any; a row without a word does not count.
        label_column: As in `label_matrix`.

    Raises:
        DataError: There are fewer than two, or some differ only in case or spacing.
    """
    words = Counter(filter(None, (_plain_word(_label_cell(example, label_column)) for example in examples)))
    if not words:
        columns = [str(column) for column in {column: None for example in examples for column in example.fields}]
        near = suggested_column("label", label_column, columns)
        raise DataError(
            f"no row has a word in a column {label_column!r}; expected the class of each row; name its column with "
            f"{spelled('label_column', near or None)}, or the column of each label with {spelled('labels')}"
        )
    if len(words) == 1:
        raise DataError(f"all rows have the class {listed_counts(words, 'rows')}; expected at least two classes")
    forms: dict[str, str] = {}
    for word in words:
        if (other := forms.setdefault(folded(word), word)) != word:
            raise DataError(
                f"classes {other!r} and {word!r} differ only in case or spacing; expected one spelling; write them "
                "alike"
            )
    return sorted(words, key=lambda word: (not word.isdecimal(), int(word) if word.isdecimal() else 0, word))


def check_label_columns(examples: Sequence[Example], names: Sequence[str]) -> None:
    """Refuse labels for which no row has a column, before anything is read.

    Raises:
        DataError: There is none for a label.
    """
    columns = {column for example in examples for column in example.fields}
    spelling = [name_in(columns, name) for name in names]
    missing = [name for name, column in zip(names, spelling, strict=True) if column not in columns]
    if not missing:
        return
    others = [str(column) for column in columns.difference(spelling)]
    listed = first_of(sorted(map(shown, others))) or "none"
    raise DataError(
        f"no row has a column {missing[0]!r}; expected one for each label; the other columns are {listed}"
        f"{did_you_mean(missing[0], others)}"
    )


def _label_cell(example: Example, column: str) -> object:
    """Return the class's name as a row has it."""
    if column in example.fields:
        return example.fields[column]
    return example.label if example.label_text is None else example.label_text


def _plain_word(value: object) -> str:
    """Return the text by which a class is compared; empty where there is none, or it has no text."""
    return label_text(plain_value(value)) or ""


def _class_of(example: Example, column: str, words: Mapping[str, int]) -> int | None:
    """Return the number of a row's class, `None` where it has none."""
    value = plain_value(_label_cell(example, column))
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    word = label_text(value) or ""
    if word not in words:
        raise DataError(
            f"{column} is {shown(value)}, expected one of {first_of([repr(name) for name in words])}"
            f"{did_you_mean(word, words)}"
        )
    return words[word]


def _cell(example: Example, column: str, name: str, reader: Labels) -> int:
    value = plain_value(example.fields.get(column))
    if isinstance(value, (str, int)) or value is None:
        if isinstance(value, str) and not value.strip():
            return MISSING
        if (known := _PLAIN_CELLS.get(value)) is not None:
            return known
    try:
        label, _ = reader.read(value)
    except CellError as problem:
        raise DataError(f"{name} {problem}") from None
    return MISSING if label is None else int(label)


def _exactly_one(labels: npt.NDArray[np.int64], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Check that a row has exactly one label; then all others are 0."""
    ones = [name for name, label in zip(names, labels, strict=True) if label == 1]
    if len(ones) > 1:
        raise DataError(f"{ones[0]!r} and {ones[1]!r} are both 1; expected exactly one of the labels in a row")
    if not ones and not (labels == MISSING).any():
        raise DataError("all labels are 0; expected exactly one of them to be 1")
    return np.where(labels == MISSING, 0, labels) if ones else labels
