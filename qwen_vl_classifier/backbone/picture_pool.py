"""Open and resize pictures in several threads, ahead of the one thread that uses them.

Pillow releases the interpreter lock while it decodes and resizes, so threads suffice. All bookkeeping is done by the
thread that takes the pictures; the others only read.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TypeAlias
from weakref import WeakValueDictionary

from qwen_vl_classifier.backbone.pixels import Pictures
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.time_limit import current_decoding_limit, decoding_limit

Stamps: TypeAlias = tuple[bytes, ...]
"""`stamp_of` each picture of an example."""

_MOST_BYTES = 128_000_000  # of pictures that are read and not taken; those being read come on top
_WAITING_EACH = 2  # pictures for each thread that are being read or wait for it


class Reading:
    """The pictures of an example, and of all others with the same ones: being read, or read.

    Args:
        example: The example. It is kept, since the stamp of a PIL image names it only as long as it is alive.
        stamps: Of its pictures.

    Attributes:
        outcome: Its pictures, or why they cannot be used; `None` while they are being read.
        failure: Any other error of the thread that read them.
    """

    __slots__ = ("__weakref__", "example", "failure", "is_taken", "outcome", "stamps")

    def __init__(self, example: Example, stamps: Stamps) -> None:
        self.example = example
        self.stamps = stamps
        self.outcome: Pictures | ImageError | None = None
        self.failure: BaseException | None = None
        self.is_taken = False

    def run(self, read: Callable[[Example], Pictures]) -> None:
        """Read the pictures."""
        try:
            self.outcome = read(self.example)
        except ImageError as error:
            self.outcome = error.with_traceback(None)  # a traceback would keep the decoder's memory alive
        except BaseException as error:  # raised again in the thread that takes them
            self.failure = error

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures, once they are read."""
        return self.outcome.nbytes if isinstance(self.outcome, Pictures) else 0


class PicturePool:
    """Threads that read the pictures of examples; a context that leaves no thread behind.

    Args:
        read: Reads the pictures of an example; called in several threads at a time.
        threads: How many; they are started when they are needed.
    """

    def __init__(self, read: Callable[[Example], Pictures], threads: int) -> None:
        self._read = read
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="read-picture")
        self._finished: SimpleQueue[Reading] = SimpleQueue()
        self._known: WeakValueDictionary[Stamps, Reading] = WeakValueDictionary()  # as long as anyone needs them
        self._unfinished = 0
        self._held = 0  # bytes that are read and not taken

    def __enter__(self) -> PicturePool:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._executor.shutdown(cancel_futures=True)

    @property
    def has_room(self) -> bool:
        """Whether further pictures may be read ahead."""
        return self._unfinished < _WAITING_EACH * self._threads and self._held < _MOST_BYTES

    def begin(self, example: Example, stamps: Stamps) -> Reading:
        """Have the pictures of an example read, if they are not yet.

        Pictures with these stamps are not read again while the `Reading` of an earlier example is held.
        """
        reading = self._known.get(stamps)
        if reading is None:
            reading = self._known[stamps] = Reading(example, stamps)
            if stamps:
                self._unfinished += 1
                self._executor.submit(self._work, reading, current_decoding_limit())
            else:
                reading.run(self._read)
        return reading

    def take(self, reading: Reading, meanwhile: Callable[[], object]) -> Pictures | ImageError:
        """Wait until pictures are read, and return them, or why they cannot be used.

        Args:
            reading: Theirs.
            meanwhile: Called after each picture that is read first, to have others begun.

        Raises:
            BaseException: What went wrong in the thread that read them, if it is no `ImageError`.
        """
        while reading.outcome is None and reading.failure is None:
            self._settle(self._finished.get())
            meanwhile()
        while not self._finished.empty():
            self._settle(self._finished.get())
        if not reading.is_taken:
            reading.is_taken = True
            if reading.stamps:
                self._held -= reading.nbytes
        if reading.failure is not None:
            raise reading.failure
        assert reading.outcome is not None
        return reading.outcome

    def _work(self, reading: Reading, seconds: float) -> None:
        with decoding_limit(seconds):
            reading.run(self._read)
        self._finished.put(reading)

    def _settle(self, reading: Reading) -> None:
        self._unfinished -= 1
        self._held += reading.nbytes
