"""A sketch of the rows that a classifier was trained on, small enough to keep in its record.

The rows are hashed by their content and the smallest hashes are kept: a fixed share of all possible rows, whichever
data set they are in (Broder, 1997, "On the resemblance and containment of documents"). Of rows that are tested, those
whose hash is in the sketch were trained on; if a share s of the training rows is among them, about s of the sketch is
found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.images.identity import picture_identities

SKETCH_ROWS = 64

SKETCH_BY = "pixels"
"""By what pictures are told, for the record of a classifier; a sketch without this told them by their files' bytes."""

_HASH_BYTES = 8


def row_hash(example: Example) -> str:
    """Hash text and pictures of an example, not its label or id: 16 hexadecimal digits.

    Raises:
        ImageError: A picture cannot be opened.
    """
    return row_hashes([example])[0]


def sketch(examples: Sequence[Example]) -> list[str]:
    """Return the smallest hashes of the examples, rising, at most 64.

    Raises:
        ImageError: A picture cannot be opened.
    """
    return sorted(set(row_hashes(examples)))[:SKETCH_ROWS]


def overlap(sketched: Iterable[str], examples: Sequence[Example]) -> int:
    """Count the examples whose hash is in a sketch.

    Raises:
        ImageError: A picture cannot be opened.
    """
    known = set(sketched)
    return sum(hashed in known for hashed in row_hashes(examples)) if known else 0


def may_have_seen(record: Mapping[str, Any], examples: Sequence[Example]) -> bool:
    """Tell whether some of the examples may have been trained on, by the record of a classifier's training.

    Raises:
        ImageError: A picture cannot be opened.
    """
    sketched = record.get("rows_sketch") or []
    if sketched and record.get("rows_sketch_by") != SKETCH_BY and any(example.images for example in examples):
        return True  # of an older version: it does not tell
    return overlap(sketched, examples) > 0


def row_hashes(examples: Sequence[Example], pictures: Sequence[Sequence[bytes]] | None = None) -> list[str]:
    """Hash each example as `row_hash` does.

    Args:
        examples: Any.
        pictures: The identities of each example's pictures, where they are known.

    Raises:
        ImageError: A picture cannot be opened.
    """
    pictures = picture_identities([example.images for example in examples]) if pictures is None else pictures
    return [_row_hash(example.text, known) for example, known in zip(examples, pictures, strict=True)]


def _row_hash(text: str, pictures: Sequence[bytes]) -> str:
    # Half of a surrogate pair cannot be written as UTF-8, and a text from Python may hold one.
    hashed = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return hashlib.sha256(hashed + b"".join(pictures)).hexdigest()[: 2 * _HASH_BYTES]
