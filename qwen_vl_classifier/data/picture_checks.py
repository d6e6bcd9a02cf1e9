"""Look at all pictures of a data set and record the rows that cannot be used: by their headers, or by decoding them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from tqdm import tqdm

from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.identity import picture_identity, stamp_of
from qwen_vl_classifier.images.opening import image_size
from qwen_vl_classifier.images.source import ImageSource

Size: TypeAlias = tuple[int, int]

_DECODING_THREADS = 4  # each holds a picture that may have many million pixels
_THREADS = 8  # on a network file system, most of the time is waiting
_ROWS = 2048  # whose headers are read together


def read_sizes(examples: Sequence[Example], bad: BadRows, *, progress: bool = False) -> list[tuple[Size, ...]]:
    """Read the header of every picture once, and record the rows whose pictures are certain to be unusable.

    A damaged picture may have a sound header: decoding can still fail.

    Args:
        examples: The data set.
        bad: Given the rows that have a picture which is missing, of another format or beyond a limit.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        For each example the (width, height) in pixels of its pictures, as `open_image` would give them; of a bad row,
        those before the picture that is bad.
    """
    known: dict[object, Size | ImageError] = {}
    sizes: list[tuple[Size, ...]] = []
    with (
        ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as executor,
        tqdm(total=len(examples), desc="check", unit="row", delay=2, disable=not progress) as bar,
    ):
        for start in range(0, len(examples), _ROWS):
            rows = examples[start : start + _ROWS]
            files = [source for row in rows for source in row.images if isinstance(source, (str, os.PathLike))]
            new = [path for path in dict.fromkeys(os.fspath(file) for file in files) if path not in known]
            known |= zip(new, executor.map(_size, new), strict=True)
            for position, example in enumerate(rows, start):
                row: list[Size] = []
                for found in _sizes(example, known):
                    if isinstance(found, ImageError):
                        bad.add(position, example, found)
                        break
                    row.append(found)
                sizes.append(tuple(row))
            bar.update(len(rows))
    return sizes


def decode_all(examples: Sequence[Example], bad: BadRows, *, progress: bool = False) -> None:
    """Decode every picture once, and record the rows with one that cannot be: for what opens pictures much later.

    Args:
        examples: The data set.
        bad: Given the rows; those in it already are passed over.
        progress: Show a progress bar if it takes more than two seconds.
    """
    rows = [(position, example) for position, example in enumerate(examples) if position not in bad]
    known: dict[bytes, ImageError | None] = {}
    with (
        ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode") as executor,
        tqdm(total=len(rows), desc="decode", unit="row", delay=2, disable=not progress) as bar,
    ):
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            stamps = [[(stamp_of(source), source) for source in example.images] for _, example in part]
            new = {stamp: source for row in stamps for stamp, source in row if stamp not in known}
            known |= zip(new, executor.map(_damage, new.values()), strict=True)
            for (position, example), row in zip(part, stamps, strict=True):
                error = next((found for stamp, _ in row if (found := known[stamp]) is not None), None)
                if error is not None:
                    bad.add(position, example, error)
            bar.update(len(part))


@dataclass(frozen=True, slots=True)
class Checked:
    """Data sets without the rows that cannot be used.

    Attributes:
        examples: The others, by what messages call the data set.
        left_out: The rows, as `BadRows.to_json` describes them, of each data set that has such.
        notes: The same in a sentence each.
    """

    examples: dict[str, Sequence[Example]]
    left_out: list[dict[str, Any]]
    notes: list[str]


def check_pixels(parts: Mapping[str, Sequence[Example]], max_errors: str | int, *, progress: bool = False) -> Checked:
    """Read all headers, then decode all pictures of some data sets, before a run that opens them again and again.

    Args:
        parts: The data sets, by what messages call them: "training rows".
        max_errors: How many rows of each may be left out, as in `BadRows`.
        progress: Show a progress bar if it takes more than two seconds.

    Raises:
        ImageError: More rows of a data set cannot be used; the message lists them.
    """
    found = {what: BadRows(max_errors, what=what, can_leave_out=True) for what in parts}
    for look in (read_sizes, decode_all):
        for what, examples in parts.items():
            look(examples, found[what], progress=progress)
            found[what].check(len(examples))
    totals = [(bad, len(parts[what])) for what, bad in found.items() if bad]
    return Checked(
        {what: bad.without(parts[what]) for what, bad in found.items()},
        [bad.to_json(total) for bad, total in totals],
        [bad.note(total) for bad, total in totals],
    )


def _damage(source: ImageSource) -> ImageError | None:
    try:
        picture_identity(source)
    except ImageError as error:
        return error.with_traceback(None)
    return None


def _sizes(example: Example, known: dict[object, Size | ImageError]) -> Iterator[Size | ImageError]:
    for source in example.images:
        if isinstance(source, (str, os.PathLike)):
            yield known[os.fspath(source)]
        else:
            yield _size(source)


def _size(source: ImageSource) -> Size | ImageError:
    try:
        return image_size(source)
    except ImageError as error:
        return error.with_traceback(None)
