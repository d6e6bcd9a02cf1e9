"""One process that decodes pictures, seen from the server: started, given work, timed and, if need be, ended."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import signal
import subprocess
import sys
import time
from typing import IO, Final

import psutil
from PIL import Image

from qwen_vl_classifier.errors import ConfigError, ImageError, one_of
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving.decoding_child import (
    ANSWER,
    CODES,
    ERROR,
    NO_MEMORY,
    PIXELS,
    READY,
    REQUEST,
    strip_rows,
)

CHILD: str = "qwen_vl_classifier.serving.decoding_child"
"""The module that the process runs."""

_START_SECONDS: Final = 60.0  # it takes a fifth of one; a machine can be busy
_PIPE_BYTES: Final = 1 << 20
_LONGEST_MESSAGE: Final = 1000
_KEPT_VARIABLES: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


class LostError(ImageError):
    """A process was lost over a picture, which may not be the reason: another process may try."""


class TooSlowError(ImageError):
    """A picture took longer than the time that was left, but less than its limit."""


class _NoAnswerError(Exception):
    """A process ended, or did not answer as it should."""


class DecodingProcess:
    """A process that decodes one picture after another; used by one thread at a time.

    Nothing that it says is believed beyond what a picture within the limits could be.

    Args:
        limits: The largest picture to let in.
        timeout: Seconds that one picture may take.
        memory_bytes: Memory that the process may take, its program included.

    Raises:
        ConfigError: It does not start, for example because `memory_bytes` is too little.
    """

    def __init__(self, limits: ImageLimits, *, timeout: float, memory_bytes: int) -> None:
        self._limits = limits
        self._timeout = timeout
        self._number = 0
        self._lost = False
        shape = (limits.max_pixels, limits.max_bytes, limits.max_aspect_ratio)
        kinds = (",".join(limits.formats), limits.grey_bits)
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", CHILD, *map(str, (memory_bytes, timeout, *shape, *kinds))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=_environment(),
        )
        try:
            self._requests = _prepared(self._process.stdin)
            self._answers = _prepared(self._process.stdout)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether it can decode."""
        return not self._lost and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The number by which the system knows it."""
        return self._process.pid

    def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
        """Decode a picture as `open_image` does, in the process.

        Args:
            data: An image file.
            seconds: Processor time that it may take now; 0 for no such limit.

        Returns:
            A picture of mode RGB.

        Raises:
            ImageError: As of `open_image`; besides, image_too_large if the memory does not suffice for it, and
                image_damaged if it takes too long. Where the process was lost, `usable` is false.
            LostError: The process ended, or did not come to decode in time.
            TooSlowError: It took longer than `seconds`.
        """
        self._number += 1
        deadline = time.monotonic() + self._timeout
        used = self._processor_seconds()
        failure: ImageError
        try:
            if not self.usable:
                raise _NoAnswerError
            self._process.send_signal(signal.SIGCONT)  # somebody may have stopped it meanwhile
            self._write(REQUEST.pack(self._number, len(data), seconds), deadline)
            self._write(data, deadline)
            number, outcome, first, second = ANSWER.unpack(self._read(ANSWER.size, deadline))
            if number != self._number:
                raise _NoAnswerError
            if outcome == PIXELS:
                return self._picture(first, second, deadline)
            raise self._error(outcome, first, deadline)
        except TimeoutError:
            idle = self._processor_seconds() - used < self._timeout / 2
            self.kill()
            failure = (LostError if idle else ImageError)(
                f"the image takes longer than {self._timeout:g} s to decode; expected a picture as cameras and "
                "programs write them; save it again"
            )
        except (_NoAnswerError, OSError):
            self.kill()
            slow = self._process.wait() == -signal.SIGPROF
            failure = (TooSlowError if slow else LostError)(
                "the image crashed the process that decoded it; expected a complete "
                f"{one_of(self._limits.formats)} file; save it again"
            )
        except BaseException as error:
            if not isinstance(error, ImageError):
                self.kill()  # what is left of its answer must not be taken for the next one
            raise
        raise failure  # not above, where it would keep half a picture in memory by what it came from

    def kill(self) -> None:
        """End the process, from any thread; a thread that waits for its answer is woken."""
        self._lost = True
        self._process.kill()

    def close(self) -> None:
        """End the process and let go of all that it used. No thread may be asking it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()

    def _processor_seconds(self) -> float:
        """Return how long it has computed so far; infinity where the system does not tell."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except (psutil.Error, OSError):
            return math.inf
        return float(times.user + times.system)

    def _wait_until_ready(self) -> None:
        errors = self._process.stderr
        assert errors is not None
        try:
            if self._read(len(READY), time.monotonic() + _START_SECONDS) != READY:
                raise _NoAnswerError
        except (_NoAnswerError, OSError) as error:  # TimeoutError among them
            self.kill()
            lines = errors.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else type(error).__name__
            raise ConfigError(
                f"the process that decodes pictures does not start ({reason}); raise decode_memory, or check that "
                f"this Python can be started"
            ) from None
        errors.close()

    def _picture(self, width: int, height: int, deadline: float) -> Image.Image:
        if not (width and height and width * height <= self._limits.max_pixels):
            raise _NoAnswerError
        image = Image.new("RGB", (width, height), None)  # every row is filled below
        rows = strip_rows(width)
        for top in range(0, height, rows):
            size = (width, min(rows, height - top))
            image.paste(Image.frombytes("RGB", size, self._read(3 * size[0] * size[1], deadline)), (0, top))
        return image

    def _error(self, outcome: int, length: int, deadline: float) -> ImageError:
        if outcome == NO_MEMORY:
            self.kill()
            return ImageError(
                "the image takes more memory to decode than is allowed; expected a smaller picture; scale it down",
                code="image_too_large",
            )
        if not (ERROR <= outcome < ERROR + len(CODES) and length <= _LONGEST_MESSAGE):
            raise _NoAnswerError
        message = self._read(length, deadline).decode(errors="replace")
        return ImageError(message if message.isprintable() else "the image is damaged", code=CODES[outcome - ERROR])

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait_for(self._requests, select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._requests, view) :]

    def _read(self, size: int, deadline: float) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            self._wait_for(self._answers, select.POLLIN, deadline)
            count = os.readv(self._answers, [view])
            if not count:
                raise _NoAnswerError
            view = view[count:]
        return content

    def _wait_for(self, pipe: int, event: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(pipe, event)
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError


def _prepared(pipe: IO[bytes] | None) -> int:
    """Return the descriptor of a pipe that holds much and never blocks."""
    assert pipe is not None
    descriptor = pipe.fileno()
    os.set_blocking(descriptor, False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # beyond what the system allows this user
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return descriptor


def _environment() -> dict[str, str]:
    """Return what a process needs to find the same modules and libraries, and none of the server's secrets."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}  # noqa: PTH100
