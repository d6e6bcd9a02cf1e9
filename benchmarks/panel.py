"""Measure what 100 classifiers on one backbone cost against one: they share the pass.

    python benchmarks/panel.py            # prints the ratios
    python benchmarks/panel.py --rows 200 --repeats 5

Every picture is another one, so that nothing is kept between rows, and the contenders take turns. Beside the ratio of
seconds stands that of CPU seconds, which others who use the machine disturb less.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from racing import race

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, Tap
from qwen_vl_classifier.classifier.head import HeadSpec

ONE_TAP = (Tap(-1, "mean"),)
SEVERAL_TAPS = (Tap(2, "image"), Tap(3, "text"), Tap(4, "mean"), Tap(5, "last"), Tap(6, "last"), Tap(-1, "mean"))


def make_panel(backbone: Backbone, taps: Sequence[Tap], count: int, kind: str) -> Panel:
    """Return classifiers with random heads, at the taps in turn, the deepest first."""
    width = backbone.hidden_size
    spec = HeadSpec("linear", width) if kind == "linear" else HeadSpec("mlp", width, units=512, dropout=0.1)
    return Panel([Classifier(backbone, taps[-1 - number % len(taps)], spec.build(), spec) for number in range(count)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    backbone = Backbone.load(options.model)
    rows = [
        Example(Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)), f"There are {number} things.")
        for number in range(options.rows)
    ]
    panels = {"one head": make_panel(backbone, ONE_TAP, 1, "linear")}
    for kind in ("linear", "mlp"):
        for name, taps in (("one tap", ONE_TAP), (f"{len(SEVERAL_TAPS)} taps", SEVERAL_TAPS)):
            panels[f"{options.heads} {kind} heads, {name}"] = make_panel(backbone, taps, options.heads, kind)
    spent: dict[str, list[float]] = {name: [] for name in panels}

    def ask(name: str) -> None:
        started = time.process_time()
        panels[name].predict_proba(rows)
        spent[name].append(time.process_time() - started)

    times = race({name: functools.partial(ask, name) for name in panels}, options.repeats)
    for name, taken in times.items():
        # Each against the single head of its own round; the first round does not count.
        wall = np.array(taken.seconds) / times["one head"].seconds
        cpu = np.array(spent[name][1:]) / spent["one head"][1:]
        record = {"what": name, "seconds": taken.median, "ratio": np.median(wall), "cpu_ratio": np.median(cpu)}
        print(json.dumps({key: value if key == "what" else round(float(value), 3) for key, value in record.items()}))


if __name__ == "__main__":
    main()
