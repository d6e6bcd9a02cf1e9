"""The program of a process that decodes pictures for a server: bytes of image files in, RGB pixels out.

It is started by `decoding_process`, which also says what goes over its pipes. Little is loaded here, nothing is kept
from one picture to the next, and limits of the system bound what a picture can do: memory, processor time, no file is
written, few are opened, no process is started. It ends when its input ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO, Final, get_args

from PIL import Image

from qwen_vl_classifier.errors import ImageCode, ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image, prepare_decoders

READY: Final = b"ready\n"
"""Written once the limits hold."""

REQUEST: Final = struct.Struct("!QQd")
"""Number of the request, how many bytes of an image file follow, and seconds of processor time after which SIGPROF ends
the process; 0 for none."""

ANSWER: Final = struct.Struct("!QBII")
"""Number of the request and an outcome. `PIXELS`: width and height; all rows of pixels follow, three bytes each.
`NO_MEMORY`: nothing follows, and the process ends. From `ERROR` on, an error of the code at that place of `CODES`: how
many bytes of its message follow, and 0."""

PIXELS: Final = 0
NO_MEMORY: Final = 1
ERROR: Final = 2
CODES: Final[tuple[ImageCode, ...]] = get_args(ImageCode)

_OPEN_FILES: Final = 16
_STRIP_BYTES: Final = 1 << 18


def strip_rows(width: int) -> int:
    """Return how many rows of a picture are sent at once, so that neither side holds all of it a second time."""
    return max(1, _STRIP_BYTES // (3 * width))


def main(arguments: list[str]) -> None:
    """Decode what comes in until there is no more.

    Args:
        arguments: Bytes of memory, seconds of processor time for a picture, and the fields of `ImageLimits`.
    """
    memory, seconds = int(arguments[0]), math.ceil(float(arguments[1]))
    limits = ImageLimits(
        int(arguments[2]), int(arguments[3]), float(arguments[4]), tuple(arguments[5].split(",")), int(arguments[6])
    )
    prepare_decoders(limits.formats)
    # Whoever stops the server may signal all of its processes; this one is needed until the server is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    _limit(memory)
    Image.new("RGB", (1024, 1024))  # where memory is too little even for this, it is said now
    # Answers have a descriptor of their own, and what libraries print from now on ends up nowhere.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    answers.write(READY)
    answers.flush()
    while decode_next(sys.stdin.buffer, answers, limits, seconds):
        pass


def decode_next(requests: BinaryIO, answers: BinaryIO, limits: ImageLimits, seconds: int) -> bool:
    """Answer one request, and tell whether there may be another."""
    header = requests.read(REQUEST.size)
    if len(header) < REQUEST.size:
        return False
    number, length, quick = REQUEST.unpack(header)
    _allow_processor_time(seconds)
    try:
        data = requests.read(length)
        signal.setitimer(signal.ITIMER_PROF, quick)
        try:
            image = open_image(data, limits=limits)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except ImageError as error:
        message = str(error).encode()
        answers.write(ANSWER.pack(number, ERROR + CODES.index(error.code), len(message), 0) + message)
    except MemoryError:
        answers.write(ANSWER.pack(number, NO_MEMORY, 0, 0))
        answers.flush()
        return False
    else:
        _send(image, number, answers)
    answers.flush()
    return True


def _send(image: Image.Image, number: int, answers: BinaryIO) -> None:
    answers.write(ANSWER.pack(number, PIXELS, image.width, image.height))
    rows = strip_rows(image.width)
    for top in range(0, image.height, rows):
        answers.write(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())


def _limit(memory: int) -> None:
    """Give up what decoding does not need. Systems other than Linux know some of these limits and not all."""
    with contextlib.suppress(OSError):  # only Linux: if memory is short, this process ends and not the server
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            if sys.platform == "linux":
                raise


def _allow_processor_time(seconds: int) -> None:
    """Let the system end this process if it computes on, even if the server that would do so is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = math.ceil(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = used + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main(sys.argv[1:])
