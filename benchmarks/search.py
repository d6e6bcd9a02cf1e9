"""Measure the search of `train` on features alone: seconds, and how much faster than one fit after the other.

    python benchmarks/search.py                 # 2,000 rows x 32 taps x 2,048 features
    python benchmarks/search.py --threads 2     # in so many threads

Features are made up: a few directions carry most of the variance, as in hidden states, and some carry the label. The
plain loop fits scikit-learn's LogisticRegression for each fold and penalty. It is measured at a few taps, in turns with
ours, and multiplied by the number of taps: all of them would take an hour.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression

from qwen_vl_classifier import Tap, TrainConfig
from qwen_vl_classifier.backbone.taps import POOLINGS
from qwen_vl_classifier.training.probe.heads import Standardised, linear_margins
from qwen_vl_classifier.training.probe.search import PENALTIES, search
from qwen_vl_classifier.training.splitting import folds

_AXES = 400  # of large variance
_SIGNAL = 30  # of those that carry the label


def make_features(
    rows: int, taps: int, width: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Return features, shape (rows, taps, width), that know the label better the later the tap, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 2).astype(np.float64)
    axes = min(_AXES, width)
    variances = np.arange(1, axes + 1) ** -0.7
    features = np.empty((rows, taps, width), dtype=np.float32)
    for tap in range(taps):
        latent = rng.normal(size=(rows, axes))
        latent[:, : min(_SIGNAL, axes)] += (labels[:, None] - 0.5) * 0.5 * tap / taps
        mixed = latent * variances @ rng.normal(size=(axes, width))
        features[:, tap] = mixed + 0.1 * rng.normal(size=(rows, width)) + rng.normal(size=width) * 3
    return features, labels


def plain_loop(features: npt.NDArray[np.float32], labels: npt.NDArray[np.float64], config: TrainConfig) -> None:
    """Fit scikit-learn's logistic regression for each fold and penalty at one tap."""
    groups = np.arange(len(labels))
    for rows, held in folds(labels.astype(np.int64), groups, config.folds, config.seed):
        mean, scale = features[rows].mean(axis=0), features[rows].std(axis=0)
        for penalty in PENALTIES:
            model = LogisticRegression(C=1 / (penalty * len(rows)), max_iter=1000)
            with warnings.catch_warnings(action="ignore"):  # the weakest penalties may not converge: no more is asked
                model.fit((features[rows] - mean) / scale, labels[rows])
            model.predict_proba((features[held] - mean) / scale)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of CPU that some work takes: others who use the machine disturb them less than time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--taps", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--loop-taps", type=int, default=2, help="taps of the plain loop (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    features, labels = make_features(options.rows, options.taps, options.width, seed=0)
    layers = -(-options.taps // len(POOLINGS))
    taps = [Tap(layer, pooling) for layer in range(1, layers + 1) for pooling in POOLINGS][: options.taps]
    config, groups = TrainConfig(), np.arange(options.rows)

    started, spent = time.perf_counter(), time.process_time()
    found = search(features, labels, groups, taps, config)
    whole = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}
    print(json.dumps({"search": whole, "candidates": len(found.candidates), "best": found.table[0]}), flush=True)

    parts, weights = folds(labels.astype(np.int64), groups, config.folds, config.seed), np.ones(options.rows)
    ours, theirs = [], []
    for number in np.linspace(options.taps - 1, 0, options.loop_taps).round().astype(int):
        at_tap = features[:, number]
        ours.append(cpu_seconds(lambda: linear_margins(Standardised.of(at_tap), labels, weights, parts, PENALTIES)))  # noqa: B023
        theirs.append(cpu_seconds(lambda: plain_loop(at_tap, labels, config)))  # noqa: B023
        print(json.dumps({"tap": str(taps[number]), "ours": ours[-1], "plain_loop": theirs[-1]}), flush=True)
    if theirs:
        print(
            f"logistic regression at one tap: {np.mean(ours):.1f} s of CPU, plain loop {np.mean(theirs):.1f} s, "
            f"{np.sum(theirs) / np.sum(ours):.0f} times as much; at {options.taps} taps it would be "
            f"{np.mean(theirs) * options.taps / 60:.0f} minutes (extrapolated from {len(theirs)})"
        )
    print(f"the whole search: {whole['seconds']:.1f} s, {whole['cpu_seconds']:.1f} s of CPU")


if __name__ == "__main__":
    main()
