"""The text that goes with pictures, remembered from training where the data has none."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_vl_classifier.errors import DataError, one_line

_FIRST_ROWS = 1000  # data whose first rows have no texts has none


def text_of_training(folders: Sequence[str | Path], *, shown: bool = True) -> str | None:
    """Return the text that all training rows had, by the records of classifiers; `None` if they do not agree on one.

    Args:
        folders: Of saved classifiers and panels.
        shown: Tell on standard error that it is used.
    """
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.model_card import training_text
    from qwen_vl_classifier.classifier.panel_folder import is_panel, read_panel

    classifiers = [one for folder in folders for one in (read_panel(folder).folders if is_panel(folder) else [folder])]
    texts = {training_text(read_manifest(folder).training) for folder in classifiers}
    text = texts.pop() if len(texts) == 1 else None
    if text is not None and shown:
        print(f"text: {one_line(text)!r}, as in all rows of training; --text gives another", file=sys.stderr)
    return text


def text_for(
    source: str | Path, folders: Sequence[str | Path], *, image_column: str, text_column: str, allow_outside: bool
) -> str | None:
    """Return the text of training for data that has no texts of its own, else `None`.

    Args:
        source: Path of the data; of a glob or an object store, nothing is known.
        folders: Of saved classifiers and panels.
        image_column: As in `load_examples`.
        text_column: As in `load_examples`.
        allow_outside: As in `load_examples`.
    """
    if not os.path.exists(source) or text_of_training(folders, shown=False) is None:  # noqa: PTH110  # it may be a URL
        return None
    from qwen_vl_classifier.data.readers import read_table
    from qwen_vl_classifier.data.table import Columns, LoadOptions, name_in
    from qwen_vl_classifier.scoring.sources import find_files

    options = LoadOptions(
        Columns(image_column, text_column), allow_outside=allow_outside, read_labels=False, read_ids=False
    )
    try:
        files = find_files(str(source))
        if len(files.paths) > 1:
            return None
        table = read_table(str(source) if files.format == "pictures" else files.paths[0], options)
        has_texts = any(
            name_in(row.values, text_column) in row.values for row in itertools.islice(table.rows, _FIRST_ROWS)
        )
    except DataError:  # reading the data will say the same
        return None
    return None if has_texts else text_of_training(folders)
