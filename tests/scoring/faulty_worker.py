"""A worker to which a picture named deadly.png does what a defect in a decoder would: a segmentation fault. One named
hanging.png keeps it for ever, as a network mount that does not answer would.

TEST_HALT: where to stop while a shard is written (see `tests/crash_points.py`).
"""

import os
import signal
import threading
from pathlib import Path

from qwen_vl_classifier.backbone import processor
from qwen_vl_classifier.scoring import local
from tests.crash_points import halt_as_told

_open_image = processor.open_image


def open_image(source, **options):
    if isinstance(source, str) and Path(source).name == "deadly.png":
        os.kill(os.getpid(), signal.SIGSEGV)
    if isinstance(source, str) and Path(source).name == "hanging.png":
        threading.Event().wait()
    return _open_image(source, **options)


if __name__ == "__main__":
    processor.open_image = open_image
    halt_as_told()
    local.main()
