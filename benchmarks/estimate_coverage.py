"""Measure how often the 95 % intervals that `train` prints hold what the classifier reaches on new rows.

    python benchmarks/estimate_coverage.py                          # about an hour on one core
    python benchmarks/estimate_coverage.py --rows 20 --draws 50     # a quick look

Statements about synthetic scenes are encoded once, by the built-in backbone. Each draw takes so many rows, in whole
pictures of two statements, chooses tap, penalty, calibration and threshold as `train` does and asks what the intervals
say; the classifier is then measured on all rows of the pool whose pictures were not drawn, thousands of them. An
interval of 95 % should hold the truth in at least 93 % of the draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from qwen_vl_classifier import Backbone, Example, Tap, TrainConfig
from qwen_vl_classifier.backbone.taps import Pooling
from qwen_vl_classifier.classifier.probabilities import calibration_errors, log_loss
from qwen_vl_classifier.classifier.ranking import auroc
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.scenes.statements import KINDS, scene_examples
from qwen_vl_classifier.training.probe.fitting import FeatureRows, fit_rows

MEASURES = ("accuracy", "log_loss", "auroc", "ece")

_POOLINGS: tuple[Pooling, ...] = ("mean", "image", "last")
_AT_ONCE = 500  # pictures that are held at a time
_TURNED = 0.15  # share of labels that are wrong in the task "noisy"


class Pool:
    """Encoded statements of one task.

    Args:
        task: "easy", statements of existence; "noisy", these with wrong labels among them; "hard", of all kinds.
        pictures: How many, with two statements about each.
        taps: Where to read.
    """

    def __init__(self, task: str, pictures: int, taps: list[Tap]) -> None:
        backbone = Backbone.load("builtin:tiny", device="cpu")
        kinds = KINDS if task == "hard" else ("existence",)
        features, batch, labels, groups = [], [], [], []
        scenes = scene_examples("test", seed=29, scenes=pictures, per_scene=2, kinds=kinds)
        for number, (picture, _, made) in enumerate(scenes):
            for statement in made:
                batch.append(Example(picture, statement.text, statement.label))
                labels.append(statement.label)
                groups.append(number)
            if number % _AT_ONCE == _AT_ONCE - 1 or number == pictures - 1:
                features.append(backbone.encode(batch, taps))
                batch = []
        turned = np.random.default_rng(0).random(len(labels)) < (_TURNED if task == "noisy" else 0)
        self.taps = taps
        self.features = np.concatenate(features)
        self.labels = (np.array(labels) ^ turned).astype(np.float64)
        self.groups = np.array(groups)


def draws(pool: Pool, rows: int, count: int, heads: str) -> Iterator[dict[str, Any]]:
    """Train so many times, each time on other rows, and yield what was promised and what came true."""
    labels, groups = pool.labels, pool.groups
    made = seed = 0
    while made < count:
        rng = np.random.default_rng([seed, rows])
        place = rng.permutation(int(groups.max()) + 1)[groups]  # rows of a picture stay together
        order = np.argsort(place, kind="stable")
        taken, left = order[:rows], order[place[order] > place[order[rows - 1]]]
        config = TrainConfig(heads=heads, seed=seed)
        drawn = FeatureRows(pool.taps, pool.features[taken], labels[taken], np.ones(rows), groups[taken])
        seed += 1
        try:
            fitted = fit_rows(drawn, pool.taps, config)
        except DataError:  # a class with fewer rows than cross-validation needs
            continue
        made += 1
        tap = pool.taps.index(fitted.search.best.tap)
        with torch.inference_mode():
            logits = fitted.head(torch.from_numpy(pool.features[left, tap].copy())).numpy()
        probability, truth = fitted.calibration.apply(logits)[:, 1], labels[left]
        yield {
            "estimate": fitted.estimate(drawn, config),
            "calibration": fitted.record,
            "truth": {
                "accuracy": float(np.mean((probability >= fitted.threshold) == (truth == 1))),
                "log_loss": log_loss(probability, truth),
                "auroc": auroc(probability, truth.astype(np.int64), np.ones(len(left))),
                "ece": calibration_errors(probability, truth)[0],
            },
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", default="10,20,50,200,1000", help="rows of a draw (default: %(default)s)")
    parser.add_argument("--tasks", default="easy,noisy,hard", help="(default: %(default)s)")
    parser.add_argument("--draws", type=int, default=100, help="for each task and size (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6000, help="of the pool (default: %(default)s)")
    parser.add_argument("--layers", default="2,4,6,-1", help="to choose among (default: %(default)s)")
    parser.add_argument("--heads", default="linear", help="as for `train` (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    taps = [Tap(int(layer), pooling) for layer in options.layers.split(",") for pooling in _POOLINGS]
    pools = {task: Pool(task, options.pictures, taps) for task in options.tasks.split(",")}
    print(f"| rows | task | {' | '.join(f'{name}: held, mean width' for name in MEASURES)} | calibrated |", flush=True)
    print(f"|---|---|{'---|' * len(MEASURES)}---|", flush=True)
    for rows in map(int, options.rows.split(",")):
        for task, pool in pools.items():
            found = [*draws(pool, rows, options.draws, options.heads)]
            cells = []
            for name in MEASURES:
                ends = np.array([[one["estimate"][name][end] for end in ("low", "high")] for one in found], dtype=float)
                truth = np.array([one["truth"][name] for one in found])
                held = (ends[:, 0] <= truth) & (truth <= ends[:, 1]) | np.isnan(ends[:, 0])
                cells.append(f"{held.mean():.0%}, {np.nanmean(ends[:, 1] - ends[:, 0]):.2f}")
            kept = np.mean([one["calibration"]["method"] != "none" for one in found])
            print(f"| {rows} | {task} | {' | '.join(cells)} | {kept:.0%} |", flush=True)
    print(json.dumps(vars(options)))


if __name__ == "__main__":
    main()
