"""Measure what 100 classifiers on one backbone cost against one: they share the pass.

    python benchmarks/panel.py            # prints the ratios
    python benchmarks/panel.py --rows 200 --repeats 5
    python benchmarks/panel.py --train    # training: the one pass, then one label and 100 labels on its features

Every picture is another one, so that nothing is kept between rows, and the contenders take turns. Beside the ratio of
seconds stands that of CPU seconds, which others who use the machine disturb less.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from racing import race

from qwen_vl_classifier import Backbone, Classifier, Example, FeatureStore, Panel, Tap, TrainConfig, train_panel
from qwen_vl_classifier.classifier.head import HeadSpec

ONE_TAP = (Tap(-1, "mean"),)
SEVERAL_TAPS = (Tap(2, "image"), Tap(3, "text"), Tap(4, "mean"), Tap(5, "last"), Tap(6, "last"), Tap(-1, "mean"))


def make_panel(backbone: Backbone, taps: Sequence[Tap], count: int, kind: str) -> Panel:
    """Return classifiers with random heads, at the taps in turn, the deepest first."""
    width = backbone.hidden_size
    spec = HeadSpec("linear", width) if kind == "linear" else HeadSpec("mlp", width, units=512, dropout=0.1)
    return Panel([Classifier(backbone, taps[-1 - number % len(taps)], spec.build(), spec) for number in range(count)])


def measure_training(backbone: Backbone, rows: Sequence[Example], labels: int) -> None:
    """Print the seconds of the pass, and of learning one and all labels from the features that it left."""
    rng = np.random.default_rng(1)
    names = [f"label{number}" for number in range(labels)]
    marked = [replace(row, fields={name: int(rng.integers(2)) for name in names}) for row in rows]
    config = TrainConfig(taps=",".join(map(str, SEVERAL_TAPS)), heads="linear")
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        for what, some in (("pass and one label", names[:1]), ("one label", names[:1]), (f"{labels} labels", names)):
            started = time.perf_counter(), time.process_time()
            train_panel(marked, labels=some, backbone=backbone, config=config, store=store, progress=False)
            wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
            print(json.dumps({"what": what, "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="measure training rather than prediction")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    backbone = Backbone.load(options.model)
    rows = [
        Example(Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)), f"There are {number} things.")
        for number in range(options.rows)
    ]
    if options.train:
        measure_training(backbone, rows, options.heads)
        return
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
