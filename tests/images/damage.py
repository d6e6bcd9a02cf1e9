"""Pictures of every format, damaged in reproducible ways: run it to open some, each of which opens or is refused.

    python -m tests.images.damage FIRST STOP FILE

opens those from one number to another, keeps the number of the last one in FILE, and prints how many opened. It ends
with an error at the first that does neither, or that a library says something about.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import warnings
from pathlib import Path

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.opening import image_size, open_image
from tests.images.picture_files import COLOUR, FILES, SMALL, encoded

SECONDS = 120  # for one picture, of a kilobyte or two: a busy machine too is done by then
MEMORY = 3 << 30

SOUND = {
    **SMALL,
    **FILES,
    "JPEG with restarts": encoded(COLOUR, "JPEG", restart_marker_blocks=2, comment=b"a comment"),
    "TIFF LZW": encoded(COLOUR, "TIFF", compression="tiff_lzw"),
    "TIFF Deflate": encoded(COLOUR, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF JPEG": encoded(COLOUR, "TIFF", compression="jpeg"),
    "TIFF PackBits": encoded(COLOUR, "TIFF", compression="packbits"),
    "TIFF fax": encoded(COLOUR.convert("1"), "TIFF", compression="group4"),
}
with contextlib.suppress(ImportError):
    from pillow_heif import from_pillow

    _heic = io.BytesIO()
    from_pillow(COLOUR).save(_heic, quality=60)
    SOUND["HEIC"] = _heic.getvalue()


def damaged(number: int) -> tuple[str, bytes]:
    """Return what a damaged picture is made of, and its bytes."""
    chance = random.Random(number)
    names = sorted(SOUND)
    name = names[number % len(names)]
    data = bytearray(SOUND[name])
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data)) if chance.random() < 0.6 else chance.randrange(min(len(data), 128))
        kind = chance.randrange(8)
        if kind < 3:  # bits and bytes
            data[at] = data[at] ^ (1 << chance.randrange(8)) if kind else chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:  # a number
            width = chance.choice((2, 4, 8))
            data[at : at + width] = chance.choice((b"\0", b"\xff", b"\x7f")) * width
        elif kind == 4:  # a piece is missing, or the end
            del data[at : at + chance.choice((1, 2, 16, len(data)))]
        elif kind == 5:  # a piece is there again
            data[at:at] = data[at : at + chance.choice((1, 4, 64, 512))] * chance.choice((1, 2, 30))
        elif kind == 6:  # a piece of another file
            other = SOUND[chance.choice(names)]
            start = chance.randrange(len(other))
            data[at : at + chance.choice((0, 16, 4096))] = other[start : start + chance.choice((4, 64, 4096))]
        else:
            data[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
        if not data:
            break
    return name, bytes(data)


def main(first: int, stop: int, place: str) -> None:
    """Open damaged pictures."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process: a decoder returns to Python only at its end
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    opened = refused = 0
    with Path(place).open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(first, stop):
            os.pwrite(file.fileno(), b"%09d" % number, 0)
            signal.alarm(SECONDS)
            _, data = damaged(number)
            try:
                picture = open_image(data)
            except ImageError:
                refused += 1
            else:
                opened += 1
                assert (picture.mode, picture.size) == ("RGB", image_size(data))
    print(json.dumps({"opened": opened, "refused": refused}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
