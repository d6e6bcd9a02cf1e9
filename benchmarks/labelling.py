"""Measure what `label` computes after an answer: the choice of the next row, and the new head.

    python benchmarks/labelling.py                       # 100,000 rows x 2,048 features, 2,000 labels
    python benchmarks/labelling.py --rows 5000 --labels 300 --width 256

Seconds are those of the CPU, in one thread, and the smallest of three runs. The choice is compared with one step of
exact greedy k-centre on all features, the head with scikit-learn's LogisticRegression for the same folds and penalties.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from qwen_vl_classifier import Tap
from qwen_vl_classifier.labelling.choosing import Chooser
from qwen_vl_classifier.labelling.learning_curve import learning_curve
from qwen_vl_classifier.labelling.live_head import fit_live_head, label_folds
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.training.probe.search import PENALTIES

_RUNS = 3
_TAP = Tap(-1, "last")


def make_pool(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features, shape (rows, 1, width), of which a few axes carry most of the variance, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    axes = min(200, width)
    latent = rng.normal(size=(rows, axes)).astype(np.float32)
    latent[:, :20] += (labels[:, None] - 0.5) * 0.4
    latent *= np.arange(1, axes + 1, dtype=np.float32) ** -0.5
    features = latent @ rng.normal(size=(axes, width)).astype(np.float32)
    features += 0.1 * rng.normal(size=width).astype(np.float32)
    return features[:, None], labels


def seconds(work: Callable[[], object]) -> float:
    """Return the least seconds of CPU that some work takes in a few runs."""
    taken = []
    for _ in range(_RUNS):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def plain_heads(inputs: np.ndarray, labels: np.ndarray, penalties: tuple[float, ...]) -> None:
    """Fit scikit-learn's logistic regression for each fold and penalty, and on all rows."""
    parts = [rows for rows, _ in label_folds(labels, np.arange(len(labels)), 5, 0)]
    for rows in [*parts, np.arange(len(labels))]:
        for penalty in penalties:
            with warnings.catch_warnings(action="ignore"):  # the weakest may not converge: no more is asked
                LogisticRegression(C=1 / (penalty * len(rows)), max_iter=1000).fit(inputs[rows], labels[rows])


def farthest(features: np.ndarray, centre: int, distances: np.ndarray) -> int:
    """Add a centre to exact greedy k-centre, and return the next."""
    np.minimum(distances, ((features - features[centre]) ** 2).sum(axis=1), out=distances)
    return int(distances.argmax())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=100_000, help="of the pool (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=2000, help="that are known (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="features of a row (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    features, labels = make_pool(options.rows, options.width)
    pool = PoolFeatures(features, [_TAP], np.arange(options.rows))
    known = np.arange(options.labels)
    passed = np.arange(options.rows) < options.labels
    head = fit_live_head(pool, known, labels[known])
    assert head is not None
    assert head.l2 is not None
    chooser = Chooser(pool, random_share=0)
    chooser.choose(passed, {}, heads=[head])  # sketches are made once
    choice = seconds(lambda: chooser.choose(passed, {}, heads=[head]))
    centre = seconds(lambda: farthest(features[:, 0], 0, np.full(options.rows, np.inf, dtype=np.float32)))
    refit = seconds(lambda: fit_live_head(pool, known, labels[known], before=head))
    at = PENALTIES.index(head.l2)
    inputs = (features[known, 0] - features[:, 0].mean(axis=0)) / features[:, 0].std(axis=0)
    plain = seconds(lambda: plain_heads(inputs, labels[known], PENALTIES[max(0, at - 1) : at + 2]))
    again = seconds(lambda: fit_live_head(pool, known, labels[known]))
    curve = seconds(lambda: learning_curve(pool, head, np.arange(options.rows) % 4 == 0))
    print(f"{options.rows:,} rows x {options.width:,} features, {options.labels:,} labels, seconds of CPU, one thread")
    print(f"next row              {choice:7.3f}   {centre / choice:6.1f} times as fast as a step of exact k-centre")
    print(f"new head              {refit:7.3f}   {plain / refit:6.1f} times as fast as scikit-learn")
    print(f"new choice of one tap {again:7.3f}")
    print(f"learning curve        {curve:7.3f}")


if __name__ == "__main__":
    main()
