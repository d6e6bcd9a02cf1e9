"""Measure the built-in backbone on NLVR (Suhr et al., ACL 2017): people's sentences about pictures of three boxes.

    PYTHONPATH=. python benchmarks/nlvr.py --data ../shared/data/nlvr            # prints a table
    PYTHONPATH=. python benchmarks/nlvr.py --data ../shared/data/nlvr --write   # puts it into docs/figures/builtin.md

The folder holds train.jsonl and dev.jsonl with `image`, `text`, `label` and `group`, and the pictures. Each training
picture is shown in all six orders of its boxes: the label does not depend on the order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tables import BUILTIN_PAGE, accuracy, put_table, with_error

from qwen_vl_classifier import (
    Backbone,
    Classifier,
    Example,
    FinetuneConfig,
    TrainConfig,
    finetune,
    load_examples,
    train,
)
from qwen_vl_classifier.images.opening import open_image
from tools.tiny.boxes import BOXES, GAP, SIDE
from tools.tiny.freed_memory import keep_freed_memory

# Published accuracy on the development set, of models trained on all 74,460 training pictures.
PUBLISHED = {"majority class": 0.553, "CNN+RNN": 0.566, "NMN": 0.631, "CNN-BiATT": 0.669}


def orders(picture: Image.Image) -> Iterator[Image.Image]:
    """Yield a picture with its boxes in all six orders, the first as it is."""
    boxes = [picture.crop((left, 0, left + SIDE, SIDE)) for left in range(0, picture.width, SIDE + GAP)]
    for order in itertools.permutations(range(BOXES)):
        shuffled = picture.copy()
        for place, number in enumerate(order):
            shuffled.paste(boxes[number], (place * (SIDE + GAP), 0))
        yield shuffled


def in_all_orders(rows: list[Example]) -> list[Example]:
    """Return six rows for each; all keep the group of their picture."""
    return [replace(row, image=picture) for row in rows for picture in orders(open_image(row.images[0]))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--seeds", type=int, default=1, help="fine-tuning runs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over all orders (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the backbone (default: %(default)s)")
    parser.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/figures/builtin.md")
    options = parser.parse_args()
    keep_freed_memory()
    training = load_examples(options.data / "train.jsonl", require_labels=True)
    dev = load_examples(options.data / "dev.jsonl", require_labels=True)
    backbone = Backbone.load(options.model)
    start = Classifier.zero_shot(backbone)
    lines = ["| dev accuracy | labels | accuracy |", "|---|---|---|"]

    def report(name: str, labels: int, values: list[float]) -> None:
        value = float(np.mean(values))
        text = with_error(value, len(dev))
        if len(values) > 1:
            text += (
                f" (s.e. over rows), ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f} over {len(values)} seeds"
            )
        print(json.dumps({"method": name, "labels": labels, "accuracies": values}), flush=True)
        lines.append(f"| {name} | {labels:,} | {text} |")

    report("zero-shot", 0, [accuracy(start, dev)])
    probe = train(training, backbone=backbone, config=TrainConfig(), progress=False)
    report("probe on frozen features", len(training), [accuracy(probe.classifier, dev)])
    reached = []
    for seed in range(options.seeds):
        config = FinetuneConfig(
            method="full",
            towers="all",
            learning_rate=options.learning_rate,
            head_learning_rate=options.learning_rate,
            batch_size=32,
            epochs=options.epochs,
            bf16=True,
            seed=seed,
        )
        result = finetune(start, in_all_orders(training), config=config, progress=False)
        reached.append(accuracy(result.classifier, dev))
        print(json.dumps({"seed": seed, "dev": reached[-1], "history": result.history}), flush=True)
    report("fine-tuned from zero-shot, six orders of boxes", len(training), reached)
    lines += [f"| {name} (published) | 74,460 | {value:.3f} |" for name, value in PUBLISHED.items()]
    print("\n".join(lines))
    if options.write:
        put_table(BUILTIN_PAGE, "nlvr", lines)


if __name__ == "__main__":
    main()
