"""The data set that is made of answers: examples with labels, and the file of them that `train` reads as it is."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.data.rows import plain_value
from qwen_vl_classifier.files.paths import is_url
from qwen_vl_classifier.files.whole import make_folders, new_file, write_file
from qwen_vl_classifier.images.file_kinds import KIND_BYTES, image_format
from qwen_vl_classifier.images.source import ImageSource

SAMPLED, ANNOTATOR = "sampled", "annotator"
"""Columns that are added: how a row was chosen, "random" for those that are a sample of all, and who labelled it."""

GIVEN = "given"
"""In the first of these columns: the label was in the data already."""


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row of the data with its labels.

    Attributes:
        position: Its position in the data.
        example: The row as the data has it.
        labels: Value by column; `None` where a label is missing.
        sampled: How it was chosen.
        annotators: Who labelled it.
    """

    position: int
    example: Example
    labels: Mapping[str, int | str | None]
    sampled: str
    annotators: tuple[str, ...] = ()

    def others(self) -> dict[str, Any]:
        """Return the other columns of the data, and the labels that it has: those of a taken name begin with `data_`.

        `score --columns` names columns in the same way.
        """
        example, taken = self.example, ("id", "image", "text", *self.labels, SAMPLED, ANNOTATOR)
        given = dict(example.fields)
        if example.label is not None and "label" not in given:
            given["label"] = example.label if example.label_text is None else example.label_text
        found: dict[str, Any] = {}
        for name, value in given.items():
            new = name
            while new in taken or new in found or (new != name and new in given):
                new = f"data_{new}"
            if new == name or value is not None:
                found[new] = value
        return found

    def own(self) -> dict[str, Any]:
        """Return the columns that are added."""
        return {**self.labels, SAMPLED: self.sampled, ANNOTATOR: ", ".join(self.annotators) or None}

    def to_example(self, label_names: tuple[str, str] | None) -> Example:
        """Return it as `train` takes it: with the label itself, or with several labels among the other columns.

        Args:
            label_names: What 0 and 1 are called where there is one label, in the column "label"; else `None`.
        """
        own = self.own()
        label = own.pop("label") if label_names else None
        word = label_names[label] if label_names and label_names != PLAIN_NAMES and label is not None else None
        return replace(self.example, label=label, label_text=word, fields={**self.others(), **own})


class LabelledFile:
    """Writes the data set, whole each time.

    Paths of pictures are written so that they hold from the folder of the file; of a picture outside of it, the path is
    absolute, and whoever reads the file has to allow that. Pictures that the data holds as bytes are written to files
    in a folder beside it.

    Args:
        path: The file.

    Attributes:
        outside: Whether a picture is outside the folder of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outside = False
        self._folder = path.parent.absolute()
        self._real = path.parent.resolve()
        self._starts: dict[int, bytes] = {}  # what does not change of a row's line, by the row's position

    def write(self, rows: Iterable[LabelledRow]) -> None:
        """Write rows in their order.

        Raises:
            OSError: They cannot be written; the older file stays.
        """
        with new_file(self.path, durable=True) as file:
            for row in rows:
                if row.position not in self._starts:
                    self._starts[row.position] = self._start(row)
                file.write(self._starts[row.position] + _json(row.own())[1:] + b"\n")

    def _start(self, row: LabelledRow) -> bytes:
        """Return the line of a row but for the columns that are added."""
        example = row.example
        names = [self._named(source) for source in example.images]
        values: dict[str, Any] = {} if example.id is None else {"id": example.id}
        values["image"] = names if len(names) > 1 else names[0] if names else None
        values["text"] = example.text
        return _json({**values, **row.others()})[:-1] + b", "

    def _named(self, source: ImageSource) -> str:
        """Return the path under which a picture is found from the folder of the file."""
        if isinstance(source, (bytes, Image.Image)):
            return self._kept(source)
        path, real = Path(os.path.normpath(source)).absolute(), Path(source).resolve()
        if not real.is_relative_to(self._real):
            self.outside = True
            return str(path)
        inside = path.is_relative_to(self._folder)
        name = str(path.relative_to(self._folder) if inside else real.relative_to(self._real))
        return f"./{name}" if is_url(name) else name

    def _kept(self, picture: bytes | Image.Image) -> str:
        """Write a picture to a file, unless it is there, and return its path."""
        if isinstance(picture, Image.Image):
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            picture = stream.getvalue()
        form = image_format(picture[:KIND_BYTES]) or "picture"
        folder = f"{self.path.stem}-pictures"
        name = f"{folder}/{hashlib.sha256(picture).hexdigest()[:32]}.{form.lower().replace('jpeg', 'jpg')}"
        if not (self._folder / name).exists():
            make_folders(self._folder / folder)
            write_file(self._folder / name, picture)
        return name


def _json(values: Mapping[str, Any]) -> bytes:
    plain = {name: _plain(value) for name, value in values.items()}
    try:
        return json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as in the name of a file that is not UTF-8
        return json.dumps(plain).encode()


def _plain(value: Any) -> Any:
    """Return a value of a column as JSON can hold it: what it has no form for becomes text."""
    value = plain_value(value)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value)
