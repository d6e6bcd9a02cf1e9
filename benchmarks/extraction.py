"""Measure extraction and the feature store at scale: memory, speed, opening a large store, bytes of a feature.

    python benchmarks/extraction.py                  # prints tables, one JSON object a line before them
    python benchmarks/extraction.py --only memory    # or opening, or size
    python benchmarks/extraction.py --stand-in       # numbers in place of the backbone's pass, which takes most time

Memory is the highest resident memory of a process that runs the verb `extract` on the built-in backbone. Pictures are
28 x 28 pixels, each unlike all others; they are decoded, resized and cut into patches also under `--stand-in`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen_vl_classifier import Backbone, FeatureStore, Tap
from qwen_vl_classifier.cli.main import main as run_command
from qwen_vl_classifier.features.feature_files import Origin, write_features

FEW = 1_000
SIDE = 28
WIDTH = 128
ROWS_OF_A_WINDOW = 256
TAPS_OF_A_LARGE_STORE = 32


def write_rows(folder: Path, count: int) -> Path:
    """Write a data set of tiny pictures, each unlike all others."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            name = f"images/{number:06d}.png"
            pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name, compress_level=1)
            row = {"image": name, "text": f"There is a red circle in row {number}.", "id": f"row-{number}"}
            file.write(json.dumps(row) + "\n")
    return path


def extract(data: Path, features: Path, *options: str, stand_in: bool) -> tuple[float, float]:
    """Run the verb in a process of its own; return seconds and the most resident megabytes."""
    script = [__file__, "--stand-in"] if stand_in else ["-m", "qwen_vl_classifier"]
    verb = ["extract", str(data), "--features", str(features), "--min-pixels", str(SIDE**2), *options]
    started = time.perf_counter()
    # The script runs itself: whoever measures holds modules that the verb does not need.
    command = [sys.executable, *script, *(["--", *verb] if stand_in else verb)]
    process = subprocess.Popen(command)  # noqa: S603  # nothing in it comes from outside
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(verb)}: ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def extract_standing_in(verb: Sequence[str]) -> int:
    """Run the verb with random numbers in place of the backbone's pass."""
    rng = np.random.default_rng(0)

    def numbers(backbone: Backbone, prepared: Sequence[Any], taps: Sequence[Tap], **_: object) -> npt.NDArray[Any]:
        return rng.standard_normal((len(prepared), len(taps), backbone.hidden_size), dtype=np.float32)

    Backbone.encode_prepared = numbers  # type: ignore[assignment, method-assign]
    return run_command(verb)


def measure_memory(folder: Path, rows: int, *, stand_in: bool) -> list[str]:
    """Extract few and many rows, then again with everything kept; return the lines of a table."""
    data = write_rows(folder, rows)
    lines = [
        "| rows | taps | resident MB | more than with few rows | rows a second, start included |",
        "|---|---|---|---|---|",
    ]
    for taps, named in (("mean:-1,last:-1", "2"), ("all", "28")):
        least = 0.0
        for count in (FEW, rows):
            features = folder / f"features-{named}-{count}"
            for what in ("", ", all kept already"):
                seconds, megabytes = extract(data, features, "--taps", taps, "--limit", str(count), stand_in=stand_in)
                least = least or megabytes
                record = {"rows": count, "taps": named, "kept": bool(what), "MB": round(megabytes)}
                record |= {"more": round(megabytes - least), "rows a second": round(count / seconds)}
                print(json.dumps(record), flush=True)
                cells = (f"{count:,}{what}", named, f"{megabytes:.0f}", f"{megabytes - least:+.0f}")
                lines.append(f"| {' | '.join(cells)} | {count / seconds:.0f} |")
    return lines


def measure_opening(folder: Path, rows: int) -> list[str]:
    """Open a store of 32 taps and look up a window of it; return the lines of a table."""
    rng = np.random.default_rng(0)
    taps = [f"mean:{layer}" for layer in range(1, TAPS_OF_A_LARGE_STORE + 1)]
    window = b""
    for _ in range(0, rows, ROWS_OF_A_WINDOW):
        window = rng.bytes(32 * ROWS_OF_A_WINDOW * len(taps))
        write_features(
            folder,
            keys=[window[start : start + 32] for start in range(0, len(window), 32)],
            taps=taps * ROWS_OF_A_WINDOW,
            ids=[None] * (ROWS_OF_A_WINDOW * len(taps)),
            origin=Origin("none", "0" * 64),
            values=rng.standard_normal((ROWS_OF_A_WINDOW * len(taps), WIDTH), dtype=np.float32).astype(np.float16),
        )
    before = _resident()
    started = time.perf_counter()
    store = FeatureStore(folder, dtype="float16")
    opened = time.perf_counter() - started
    grown = _resident() - before
    keys = np.frombuffer(window, dtype=np.uint8).reshape(-1, 32)
    started = time.perf_counter()
    held = store.holds(keys).all()
    checked = time.perf_counter() - started
    started = time.perf_counter()
    held &= store.holds(keys).all()
    looked_up = time.perf_counter() - started
    assert held
    values = {
        "features": f"{len(store):,}",
        "files": f"{len(list(folder.iterdir())):,}",
        "opening, seconds": f"{opened:.2f}",
        "resident memory of the index, MB": f"{grown:.0f}",
        f"looking up {len(keys):,} features for the first time, with a check of their file, seconds": f"{checked:.3f}",
        "looking them up again, seconds": f"{looked_up:.3f}",
    }
    print(json.dumps(values), flush=True)
    return ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())]


def measure_size(folder: Path, rows: int) -> list[str]:
    """Keep real features in both types; return the lines of a table."""
    data = write_rows(folder, min(rows, FEW))
    lines = ["| type | features | bytes of one, key, tap and id included |", "|---|---|---|"]
    for dtype in ("float32", "float16"):
        store = folder / dtype
        extract(data, store, "--taps", "all", "--feature-dtype", dtype, stand_in=False)
        size = sum(path.stat().st_size for path in store.iterdir())
        count = len(FeatureStore(store, dtype=dtype))
        print(json.dumps({"type": dtype, "features": count, "bytes": size}), flush=True)
        lines.append(f"| {dtype} | {count:,} of {WIDTH} numbers | {size / count:.0f} |")
    return lines


def _resident() -> float:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the large data set (default: %(default)s)")
    parser.add_argument("--only", choices=("memory", "opening", "size"), help="measure this part alone")
    parser.add_argument("--stand-in", action="store_true", help="put numbers in place of the backbone's pass")
    parser.add_argument("verb", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.verb:
        raise SystemExit(extract_standing_in(options.verb))
    parts: dict[str, Callable[[Path], list[str]]] = {
        "memory": lambda folder: measure_memory(folder, options.rows, stand_in=options.stand_in),
        "opening": lambda folder: measure_opening(folder, options.rows),
        "size": lambda folder: measure_size(folder, options.rows),
    }
    for part, measure in parts.items():
        if options.only in (None, part):
            with tempfile.TemporaryDirectory() as folder:
                print("\n".join(measure(Path(folder))), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
