"""What it costs to open and resize pictures, by the number of threads, and whether a model waits for it.

    python -m benchmarks.preparing

The first table says what one thread does with a picture, in its own processor time; the second how many pictures a
second come out of the pool of threads, all numbers of threads in turn in every round, as ratios to one thread. The last
line encodes the same pictures and says for how long the model had none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.pictures import examples, photo
from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.windows import prepare_outcomes, windows
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.images.identity import pixel_identity, stamp_of
from qwen_vl_classifier.images.limits import decoding_threads
from qwen_vl_classifier.images.look_alikes import look_of
from qwen_vl_classifier.images.opening import open_image

_SIZES = ((364, 364), (896, 896), (1600, 1200), (6000, 4000))
_MEGAPIXELS = 120  # that are prepared in one round, so that each takes about as long
_DRAWN = 4  # pictures of each size; a byte behind its end makes a JPEG another file


def _milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median of the processor time of this thread."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return 1000 * statistics.median(taken)


def steps(processor: Processor, data: bytes, repeats: int) -> dict[str, float]:
    """Return the milliseconds of each thing that is done with a picture, and of all of them."""
    picture = open_image(data)
    pictures = processor.resize_pictures([picture])
    work: dict[str, Callable[[], object]] = {
        "stamp": lambda: stamp_of(data),
        "open": lambda: open_image(data),
        "resize, key": lambda: processor.resize_pictures([picture]),
        "of it key": lambda: processor.take_pictures(pictures.pixels),
        "identity, looks": lambda: (pixel_identity(picture), look_of(picture)),
        "score: all": lambda: processor.read_pictures(Example(data, ""), identify=False),
    }
    return {name: _milliseconds(one, repeats) for name, one in work.items()}


def rates(processor: Processor, rows: Sequence[Example], threads: Sequence[int], rounds: int) -> dict[int, list[float]]:
    """Return the pictures a second of each round, by the number of threads."""
    read = partial(processor.read_pictures, identify=False)
    found: dict[int, list[float]] = {number: [] for number in threads}
    for _ in range(rounds):
        for number in threads:
            start = time.perf_counter()
            for _ in prepare_outcomes(processor, rows, at_hand=True, read=read, threads=number):
                pass
            found[number].append(len(rows) / (time.perf_counter() - start))
    return found


def waiting(backbone: Backbone, rows: Sequence[Example]) -> tuple[float, float]:
    """Return the seconds that encoding takes in all, and those of them in which the model had nothing to do."""
    start = time.perf_counter()
    waited = 0.0
    stream = windows(backbone.processor, rows, BadRows())
    asked = time.perf_counter()
    for window in stream:
        waited += time.perf_counter() - asked
        backbone.encode_prepared(window.prepared, [Tap(-1, "mean")])
        asked = time.perf_counter()
    return time.perf_counter() - start, waited


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="small pictures, to see that it runs")
    parser.add_argument("--model", default="builtin:tiny", help="what encodes; its pixel limits decide the sizes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-pixels", type=int, default=1_003_520, help="of a picture after resizing")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    rounds, repeats = (1, 1) if flags.quick else (flags.rounds, 9)
    sizes = ((56, 56),) if flags.quick else _SIZES
    backbone = Backbone.load(flags.model, device=flags.device, max_pixels=flags.max_pixels)
    processor = backbone.processor
    most = decoding_threads()
    threads = sorted({1, *(number for number in (2, 4, 8) if number < most), most})
    rng = np.random.default_rng(0)

    print(f"milliseconds of one thread, JPEG, at most {flags.max_pixels:,} pixels after resizing")
    named: Sequence[str] = ()
    for size in sizes:
        found = steps(processor, photo(rng, *size), repeats)
        if not named:
            named = tuple(found)
            print(f"| picture | {' | '.join(named)} |\n|{'---|' * (len(named) + 1)}")
        print(f"| {size[0]} x {size[1]} | {' | '.join(f'{found[name]:.1f}' for name in named)} |", flush=True)

    print(f"\npictures a second, {most} threads are the default here; in brackets the ratio to one thread")
    print(f"| picture | {' | '.join(map(str, threads))} |\n|{'---|' * (len(threads) + 1)}")
    for size in sizes:
        count = 4 if flags.quick else min(512, max(4, _MEGAPIXELS * 1_000_000 // (size[0] * size[1])))
        drawn = [photo(rng, *size) for _ in range(min(count, _DRAWN))]
        rows = [Example(drawn[row % _DRAWN] + bytes([row // _DRAWN]), "x") for row in range(count)]
        measured = rates(processor, rows, threads, rounds)
        cells = []
        for number in threads:
            ratio = statistics.median(a / b for a, b in zip(measured[number], measured[1], strict=True))
            cells.append(f"{statistics.median(measured[number]):.1f} ({ratio:.2f})")
        print(f"| {size[0]} x {size[1]} | {' | '.join(cells)} |", flush=True)

    rows = examples(4 if flags.quick else 512, [sizes[0]], (5, 10))
    total, waited = waiting(backbone, rows)
    print(f"\nencode of {len(rows)} pictures of {sizes[0][0]} x {sizes[0][1]} on {backbone.device}: {total:.2f} s,")
    print(f"of which the model had no pictures for {waited:.2f} s ({waited / total:.1%}), the first window included")


if __name__ == "__main__":
    main()
