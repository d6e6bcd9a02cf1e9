"""A decoding process that does what the "picture" says: crash, hang, grow, lie, or tell how it was started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving import decoding_child
from qwen_vl_classifier.serving.decoding_child import ANSWER, ERROR, PIXELS

_ANSWERS = 3  # the descriptor that `main` writes to


def _obey(data: bytes, *, limits: ImageLimits) -> Image.Image:
    order = data.decode("latin-1").split()
    match order:
        case ["!kill", name]:
            os.kill(os.getpid(), getattr(signal, name))
        case ["!once", folder, name]:
            if not Path(folder, "once").exists():
                Path(folder, "once").mkdir()
                os.kill(os.getpid(), getattr(signal, name))
        case ["!abort"]:
            os.abort()
        case ["!exit", status]:
            os._exit(int(status))
        case ["!raise"]:
            raise RuntimeError("a defect")
        case ["!spin"]:
            while True:
                pass
        case ["!hold", folder]:
            Path(folder, "held").mkdir(exist_ok=True)
            while not Path(folder, "open").exists():
                time.sleep(0.005)
        case ["!grow"]:
            hoard = []
            while True:
                hoard.append(bytearray(1 << 24))
        case ["!print"]:
            os.write(1, b"something that a library prints")
            print("something", flush=True)
        case ["!say", *words]:
            os.write(_ANSWERS, eval(" ".join(words), {"ANSWER": ANSWER, "ERROR": ERROR, "PIXELS": PIXELS}))
        case ["!tell", expression]:
            raise ImageError(str(eval(expression, {"os": os, "sys": sys})))
        case _:
            return open_image(data, limits=limits)
    return Image.new("RGB", (1, 1))


if __name__ == "__main__":
    decoding_child.open_image = _obey
    decoding_child.main(sys.argv[1:])
