"""Measure what docs/explanation/training.md advises: how many labels, what to freeze, which learning rate.

    python scripts/choices.py --data FOLDER            # prints the tables
    python scripts/choices.py --data FOLDER --write    # and puts them into docs/explanation/training.md

FOLDER holds one folder for each data set, with train.jsonl; dev rows are not looked at. A quarter of the train rows,
whole in pictures and groups, is held out and measured; the rest is what there is to learn from, validation included.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss

from qwen_vl_classifier import (
    Backbone,
    Classifier,
    Example,
    FeatureStore,
    FinetuneConfig,
    TrainConfig,
    finetune,
    load_examples,
    train,
)
from qwen_vl_classifier.training.splitting import groups_of, holdout

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "training.md"
LABELS = (20, 50, 100, 200, 400)
PROBES = {
    "calibrated zero-shot": {"heads": "calibrated"},
    "logistic regression, mean:-1": {"heads": "linear", "taps": "mean:-1"},
    "auto probe": {},
}
BASE = FinetuneConfig(epochs=3, patience=2, head_learning_rate=1e-3, report_to="none")
FREEZE: tuple[dict[str, Any], ...] = (
    {"method": "lora", "towers": "llm", "learning_rate": 5e-4},
    {"method": "lora", "towers": "llm+vision", "learning_rate": 5e-4},
    {"method": "lora", "towers": "all", "learning_rate": 5e-4},
    {"method": "full", "towers": "llm", "learning_rate": 2e-4},
    {"method": "full", "towers": "all", "learning_rate": 2e-4},
)
RATES: tuple[dict[str, Any], ...] = (
    *({"method": "lora", "towers": "llm", "learning_rate": rate} for rate in (5e-5, 2e-4, 5e-4, 2e-3)),
    *({"method": "full", "towers": "all", "learning_rate": rate} for rate in (1e-5, 5e-5, 2e-4, 1e-3)),
)


class Split:
    """One data set: rows to learn from, and a quarter held out."""

    def __init__(self, folder: Path, backbone: Backbone, store: FeatureStore) -> None:
        self.name, self.backbone, self.store = folder.name, backbone, store
        rows = load_examples(folder / "train.jsonl", require_labels=True)
        learn, held = holdout(rows, 0.25, seed=11)
        self.learn = [rows[row] for row in learn]
        self.held = [rows[row] for row in held]

    def some(self, count: int, seed: int) -> list[Example]:
        """Draw about so many rows to learn from, whole in pictures and groups."""
        groups = groups_of(self.learn)
        order = np.random.default_rng(seed).permutation(np.unique(groups))
        place = {group: number for number, group in enumerate(order)}
        return [self.learn[row] for row in sorted(range(len(groups)), key=lambda row: place[groups[row]])[:count]]

    def measure(self, classifier: Classifier) -> tuple[float, float]:
        """Return accuracy and log loss on the rows held out."""
        store = self.store if classifier.backbone.fingerprint == self.backbone.fingerprint else None
        probability = classifier.predict_proba(self.held, store=store)
        labels = [row.label for row in self.held]
        right = (probability[:, 1] >= classifier.threshold) == np.array(labels)
        return float(right.mean()), float(log_loss(labels, probability, labels=[0, 1]))


def labels_table(splits: Sequence[Split], seeds: Sequence[int]) -> Iterator[str]:
    """Measure probes on growing numbers of labels."""
    yield f"| set | method | {' | '.join(map(str, LABELS))} | all |"
    yield "|---|---|" + "---:|" * (len(LABELS) + 1)
    for split in splits:
        for name, options in PROBES.items():
            cells = []
            for count in (*LABELS, len(split.learn)):
                accuracies = []
                for seed in seeds:
                    config = TrainConfig(seed=seed, **options)
                    rows = split.some(count, seed)
                    probe = train(rows, backbone=split.backbone, config=config, store=split.store, progress=False)
                    accuracies.append(split.measure(probe.classifier)[0])
                cells.append(f"{np.mean(accuracies):.3f}")
            yield f"| {split.name} | {name} | {' | '.join(cells)} |"


def finetune_table(splits: Sequence[Split], choices: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Measure ways to fine-tune, all from the same probe."""
    yield "| set | method | trains | learning rate | accuracy ± s.e. | log loss | state kept | minutes |"
    yield "|---|---|---|---:|---:|---:|---|---:|"
    for split in splits:
        probe = train(split.learn, backbone=split.backbone, store=split.store, progress=False).classifier
        accuracy, loss = split.measure(probe)
        yield f"| {split.name} | probe | head | | {with_error(accuracy, split)} | {loss:.3f} | | |"
        for options in choices:
            started = time.monotonic()
            result = finetune(probe, split.learn, config=replace(BASE, **options), store=split.store, progress=False)
            minutes = (time.monotonic() - started) / 60
            accuracy, loss = split.measure(result.classifier)
            best = min(result.history, key=lambda entry: entry["validation_log_loss"])
            kept = f"epoch {best['epoch']:.0f}" if result.improved else "the probe"
            yield (
                f"| {split.name} | {options['method']} | {options['towers']} | {options['learning_rate']:g} "
                f"| {with_error(accuracy, split)} | {loss:.3f} | {kept} | {minutes:.1f} |"
            )


def with_error(accuracy: float, split: Split) -> str:
    """Write an accuracy with its binomial standard error."""
    return f"{accuracy:.3f} ± {math.sqrt(accuracy * (1 - accuracy) / len(split.held)):.3f}"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=("easyvqa_tiny",), help="which sets (default: %(default)s)")
    parser.add_argument("--what", nargs="+", default=("labels", "freeze", "rates"), help="(default: %(default)s)")
    parser.add_argument("--features", type=Path, help="keep features here (default: for this run only)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/explanation/training.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(options.features or folder)
        splits = [Split(options.data / name, backbone, store) for name in options.sets]
        tables = {
            "labels": lambda: labels_table(splits, seeds=(0, 1, 2)),
            "freeze": lambda: finetune_table(splits, FREEZE),
            "rates": lambda: finetune_table(splits, RATES),
        }
        for what in options.what:
            lines = []
            for line in tables[what]():
                print(line, flush=True)
                lines.append(line)
            if options.write:
                write(what, lines)


def write(what: str, lines: Sequence[str]) -> None:
    """Put a table between its marks in the page."""
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- {what} begins -->\n", f"<!-- {what} ends -->\n"
    before, after = text.index(begin) + len(begin), text.index(end)
    DOCUMENT.write_text(text[:before] + "\n".join(lines) + "\n" + text[after:], encoding="utf-8")


if __name__ == "__main__":
    main()
