"""A limit on the processor time that the decoding of one picture takes, in the thread that decodes it."""

from __future__ import annotations

import io
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_vl_classifier.errors import ImageError

_of_thread = threading.local()


@contextmanager
def decoding_limit(seconds: float) -> Iterator[None]:
    """Limit the processor time of each picture that `open_image` decodes in this thread, until the block ends.

    Args:
        seconds: For one picture. Time of other threads and processes does not count.
    """
    before = current_decoding_limit()
    _of_thread.seconds = seconds
    try:
        yield
    finally:
        _of_thread.seconds = before


def current_decoding_limit() -> float:
    """Return the limit of this thread, in seconds, for another thread that decodes on its behalf."""
    seconds: float = getattr(_of_thread, "seconds", math.inf)
    return seconds


class TimedBytes(io.BytesIO):
    """The bytes of a picture, which a decoder reads piece by piece for as long as its time lasts.

    What a decoder does without reading is bounded by the pixels of the picture.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._seconds = current_decoding_limit()
        self._end = time.thread_time() + self._seconds

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as `io.BytesIO` does.

        Raises:
            ImageError: The time is over.
        """
        if time.thread_time() > self._end:
            raise ImageError(f"takes longer than {self._seconds:g} s of processor time to decode")
        return super().read(size)
