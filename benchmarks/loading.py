"""What it costs to load a backbone and to compute its fingerprint, the first time and again.

    python -m benchmarks.loading

Each figure is that of a fresh process: with the files in the memory of the operating system or only on the disk, and
with their digests kept by a process before or not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoints import Shape, Tower, write_checkpoint

_SHAPE = Shape("600m", Tower(24, 1280, 3456, 16, 4), Tower(4, 320, 864, 4, 4), (1, 3), 151936, 364)
_FILES = 4  # about; published checkpoints of 3 to 8 billion weights have two to five
_CODE = """
import sys, time
begun = time.perf_counter()
from qwen_vl_classifier.backbone.backbone import Backbone
start = time.perf_counter()
backbone = Backbone.load(sys.argv[1], device=sys.argv[2], dtype="bfloat16")
loaded = time.perf_counter()
backbone.fingerprint
print(start - begun, loaded - start, time.perf_counter() - loaded)
"""


def measure(folder: Path, caches: Path, device: str, *, in_memory: bool) -> tuple[float, float, float]:
    """Return the seconds that imports, loading and the fingerprint take in a process of their own."""
    if not in_memory:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run(  # noqa: S603 - this interpreter, and the code above
        [sys.executable, "-c", _CODE, str(folder), device],
        env={**os.environ, "XDG_CACHE_HOME": str(caches)},
        capture_output=True,
        text=True,
        check=True,
    )
    imports, loading, fingerprint = map(float, done.stdout.split())
    return imports, loading, fingerprint


def main() -> None:
    """Print the least seconds of several runs, in turn."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured; the least counts")
    parser.add_argument("--device", default="cpu", help="where to load to (default: %(default)s)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = write_checkpoint(_SHAPE, Path(place) / "checkpoint", shard_bytes=2 * 620_000_000 // _FILES)
        files = list(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        measure(folder, Path(place) / "kept", flags.device, in_memory=True)
        found: dict[tuple[bool, bool], list[tuple[float, float, float]]] = {}
        for number in range(flags.repeat):
            for kept in (False, True):
                for in_memory in (False, True):
                    caches = Path(place) / ("kept" if kept else f"{number} {in_memory}")
                    seconds = measure(folder, caches, flags.device, in_memory=in_memory)
                    found.setdefault((kept, in_memory), []).append(seconds)
    print(f"{size / 1e6:.0f} MB of weights in {len(files)} files, {os.cpu_count()} processors, to {flags.device}")
    for (kept, in_memory), runs in found.items():
        imports, loading, fingerprint = (min(times) for times in zip(*runs, strict=True))
        print(
            f"digests {'kept' if kept else 'not kept':<8}  files {'in memory' if in_memory else 'on disk':<9}  "
            f"imports {imports:.2f} s  load {loading:.2f} s  fingerprint {fingerprint:.3f} s"
        )


if __name__ == "__main__":
    main()
