"""A sketch of the rows that a classifier was trained on, small enough to keep in its record.

The rows are hashed by their content and the smallest hashes are kept: a fixed share of all possible rows, whichever
data set they are in (Broder, 1997, "On the resemblance and containment of documents"). Of rows that are tested, those
whose hash is in the sketch were trained on; if a share s of the training rows is among them, about s of the sketch is
found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from qwen_vl_classifier.data.example import Example, ImageSource
from qwen_vl_classifier.errors import ImageError

SKETCH_ROWS = 64

_HASH_BYTES = 8


def row_hash(example: Example) -> str:
    """Hash text and pictures of an example, not its label or id: 16 hexadecimal digits.

    A picture counts by the content of its file, so that it is known again under another path; a PIL image counts by
    its pixels.

    Raises:
        ImageError: A picture's file cannot be read.
    """
    return next(row_hashes([example]))


def sketch(examples: Iterable[Example]) -> list[str]:
    """Return the smallest hashes of the examples, rising, at most 64.

    Raises:
        ImageError: A picture's file cannot be read.
    """
    return sorted(set(row_hashes(examples)))[:SKETCH_ROWS]


def overlap(sketched: Iterable[str], examples: Iterable[Example]) -> int:
    """Count the examples whose hash is in a sketch.

    Raises:
        ImageError: A picture's file cannot be read.
    """
    known = set(sketched)
    return sum(hashed in known for hashed in row_hashes(examples)) if known else 0


def row_hashes(examples: Iterable[Example]) -> Iterator[str]:
    """Hash each example as `row_hash` does; a file that several share is read once.

    Raises:
        ImageError: A picture's file cannot be read.
    """
    for example, digests in _with_digests(examples):
        # Half of a surrogate pair cannot be written as UTF-8, and a text from Python may hold one.
        text = hashlib.sha256(example.text.encode("utf-8", errors="surrogatepass"))
        yield hashlib.sha256(text.digest() + b"".join(digests)).hexdigest()[: 2 * _HASH_BYTES]


def picture_digests(examples: Iterable[Example]) -> Iterator[tuple[bytes, ...]]:
    """Hash the content of each example's pictures, 32 bytes each; a file that several share is read once.

    Raises:
        ImageError: A picture's file cannot be read.
    """
    return (digests for _, digests in _with_digests(examples))


def _with_digests(examples: Iterable[Example]) -> Iterator[tuple[Example, tuple[bytes, ...]]]:
    known: dict[str, bytes] = {}  # by path: often several rows are about one picture

    def digest(source: ImageSource) -> bytes:
        if isinstance(source, bytes):
            return hashlib.sha256(source).digest()
        if isinstance(source, Image.Image):
            return hashlib.sha256(f"{source.mode} {source.size} ".encode() + source.tobytes()).digest()
        path = os.fspath(source)
        if path not in known:
            known[path] = _file_digest(path)
        return known[path]

    for example in examples:
        yield example, tuple(digest(source) for source in example.images)


def _file_digest(path: str) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(
            f"{path[:80]!r} cannot be read ({type(error).__name__}); wanted a picture's file", code="image_missing"
        ) from error
