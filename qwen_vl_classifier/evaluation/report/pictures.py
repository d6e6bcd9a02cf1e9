"""Pictures of the examples that a page shows: small, few, and left out where they cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.images.thumbnails import thumbnail

SIDE = 320
"""Longer side of a thumbnail, in pixels: a page shows it at half that size, and whole when it is enlarged."""

SMALL_SIDE = 192
"""The same on the page of a panel, which shows rows of many labels."""

MOST_PICTURES = 150
MOST_BYTES = 5_000_000
"""Of all thumbnails together, as they stand in the page (base64)."""


class Thumbnails:
    """Makes thumbnails of rows until a page is full.

    Args:
        examples: The evaluated examples in their order, or `None` where there are none to take pictures from.
        made: Thumbnails that were made while the pictures were open, by row.
        most_pictures: How many thumbnails to make.
        most_bytes: How much base64 text they may come to.
        side: Longer side of a thumbnail, in pixels.
    """

    def __init__(
        self,
        examples: Sequence[Example] | None,
        made: Mapping[int, Sequence[dict[str, Any]]] | None = None,
        *,
        most_pictures: int = MOST_PICTURES,
        most_bytes: int = MOST_BYTES,
        side: int = SIDE,
    ) -> None:
        self._side = side
        self._examples = examples
        self._made = made or {}
        self._pictures_left = most_pictures
        self._bytes_left = most_bytes

    def of(self, row: int) -> tuple[list[dict[str, Any]], str | None]:
        """Return the thumbnails of a row, and why some are absent (`None` where none is)."""
        pictures: list[dict[str, Any]] = []
        for source in self._made.get(row) or (self._examples[row].images if self._examples else ()):
            if not self._pictures_left:
                return pictures, "Picture left out: the page is full."
            try:
                picture = source if isinstance(source, dict) else thumbnail(open_image(source), self._side)
            except ImageError:
                return pictures, "The picture cannot be opened."
            if len(picture["content"]) > self._bytes_left:
                self._pictures_left = 0
                return pictures, "Picture left out: the page is full."
            self._pictures_left -= 1
            self._bytes_left -= len(picture["content"])
            pictures.append(picture)
        return pictures, None
