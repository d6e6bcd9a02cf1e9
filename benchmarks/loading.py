"""What it costs to load a backbone from a folder a second time: digests of its weight files are kept.

    python -m benchmarks.loading

Each figure is that of a fresh process, with the files in the memory of the operating system.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoints import Shape, Tower, write_checkpoint

_SHAPE = Shape("300m", Tower(24, 1024, 2816, 16, 4), Tower(4, 320, 864, 4, 4), (1, 3), 151936, 364)
_CODE = """
import sys, time
from qwen_vl_classifier.backbone.backbone import Backbone
start = time.perf_counter()
backbone = Backbone.load(sys.argv[1], device="cpu", dtype="bfloat16")
loaded = time.perf_counter()
backbone.fingerprint
print(loaded - start, time.perf_counter() - loaded)
"""


def measure(folder: Path, caches: Path) -> tuple[float, float]:
    """Return the seconds that loading and the fingerprint take in a process of their own."""
    done = subprocess.run(  # noqa: S603 - this interpreter, and the code above
        [sys.executable, "-c", _CODE, str(folder)],
        env={**os.environ, "XDG_CACHE_HOME": str(caches)},
        capture_output=True,
        text=True,
        check=True,
    )
    loading, fingerprint = map(float, done.stdout.split())
    return loading, fingerprint


def main() -> None:
    """Print seconds with an empty cache, and with what the run before it has kept."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured; the least counts")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = write_checkpoint(_SHAPE, Path(place) / "checkpoint")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        measure(folder, Path(place) / "warm")
        first = min(measure(folder, Path(place) / str(number)) for number in range(flags.repeat))
        again = min(measure(folder, Path(place) / "warm") for _ in range(flags.repeat))
    saved = first[1] - again[1]
    print(f"{size / 1e6:.0f} MB of weights")
    for name, (loading, fingerprint) in (("empty cache", first), ("kept digests", again)):
        print(f"{name:<13} load {loading:.2f} s, fingerprint {fingerprint:.3f} s")
    print(f"saved: {saved:.2f} s of {sum(first):.2f} s, {saved / size * 1e9:.2f} s for each GB")


if __name__ == "__main__":
    main()
