"""Look at all pictures of a data set and record the rows that cannot be used: by their headers, or by decoding them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.identity import picture_identity, stamp_of
from qwen_vl_classifier.images.limits import decoding_threads
from qwen_vl_classifier.images.opening import image_size
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.progress_bars import tqdm

Size: TypeAlias = tuple[int, int]
T = TypeVar("T")

_HEADER_THREADS = 8  # on a network file system, most of the time is waiting
_ROWS = 2048  # whose pictures are looked at together


def read_sizes(
    examples: Sequence[Example], bad: BadRows, *, progress: bool = False, title: str = "read picture headers"
) -> list[tuple[Size, ...]]:
    """Read the header of every picture once, and record the rows whose pictures are certain to be unusable.

    The header of a damaged picture may be intact: decoding can still fail.

    Args:
        examples: The data set.
        bad: Collects the rows that have a picture which is missing, of another format or beyond a limit.
        progress: Show a progress bar if it takes more than two seconds.
        title: Of the progress bar.

    Returns:
        For each example the (width, height) in pixels of its pictures, as `open_image` would give them; of a bad row,
        those before the picture that is bad.
    """
    return _look(examples, bad, image_size, _path_or_object, title, _HEADER_THREADS, progress=progress)


def decode_all(
    examples: Sequence[Example], bad: BadRows, *, progress: bool = False, title: str = "decode pictures"
) -> None:
    """Decode every picture once, and record the rows with one that cannot be: for work that opens pictures much later.

    Args:
        examples: The data set.
        bad: Collects the rows; those in it already are passed over.
        progress: Show a progress bar if it takes more than two seconds.
        title: Of the progress bar.
    """
    _look(examples, bad, picture_identity, stamp_of, title, decoding_threads(), progress=progress)


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
    found = {
        what: BadRows(max_errors, what=what, can_leave_out=True, given=examples) for what, examples in parts.items()
    }
    for check in (read_sizes, decode_all):
        for what, examples in parts.items():
            check(examples, found[what], progress=progress)
            found[what].check(len(examples))
    totals = [(bad, len(parts[what])) for what, bad in found.items() if bad]
    return Checked(
        {what: bad.without(parts[what]) for what, bad in found.items()},
        [bad.to_json(total) for bad, total in totals],
        [bad.note(total) for bad, total in totals],
    )


def _look(
    examples: Sequence[Example],
    bad: BadRows,
    look: Callable[[ImageSource], T],
    key: Callable[[ImageSource], Hashable],
    title: str,
    threads: int,
    *,
    progress: bool,
) -> list[tuple[T, ...]]:
    """Look at each picture once, and record the rows with a picture that raises an `ImageError`.

    Args:
        examples: The data set; rows that are in `bad` already are passed over.
        bad: Collects the rows.
        look: What is done with a picture, in several threads.
        key: Pictures with the same key are looked at once.
        title: Of the progress bar.
        threads: How many.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        For each example the results for its pictures, up to the first that is bad.
    """

    def outcome_of(source: ImageSource) -> T | ImageError:
        try:
            return look(source)
        except ImageError as error:
            return error.with_traceback(None)

    known: dict[Hashable, T | ImageError] = {}
    results: list[tuple[T, ...]] = []
    with (
        ThreadPoolExecutor(threads, thread_name_prefix=title) as executor,
        tqdm(total=len(examples), desc=title, unit="row", delay=2, disable=not progress) as bar,
    ):
        for start in range(0, len(examples), _ROWS):
            rows = examples[start : start + _ROWS]
            pictures = [
                [(key(source), source) for source in example.images] if position not in bad else []
                for position, example in enumerate(rows, start)
            ]
            new = {name: source for row in pictures for name, source in row if name not in known}
            known |= zip(new, executor.map(outcome_of, new.values()), strict=True)
            for position, (example, row) in enumerate(zip(rows, pictures, strict=True), start):
                found: list[T] = []
                for name, _ in row:
                    outcome = known[name]
                    if isinstance(outcome, ImageError):
                        bad.add(position, example, outcome)
                        break
                    found.append(outcome)
                results.append(tuple(found))
            bar.update(len(rows))
    return results


def _path_or_object(source: ImageSource) -> Hashable:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else id(source)
