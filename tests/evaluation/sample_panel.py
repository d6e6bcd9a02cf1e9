"""Evaluations of the shape that `evaluate_panel` returns, made of random labels: what the tests of its report show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qwen_vl_classifier import Classifier, Panel, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.data.targets import MISSING
from qwen_vl_classifier.evaluation.panels.panel_evaluation import panel_figures
from qwen_vl_classifier.evaluation.panels.panel_verdict import panel_notes, panel_sentence


def make_panel_evaluation(
    names=("defect", "scratch", "dirty"),
    rows=120,
    *,
    one_of=False,
    missing=0.1,
    resamples=20,
    texts=("The part is fine.",),
    ids=(None,),
    images=(None,),
    strength=1.5,
):
    """Make an evaluation of a middling panel; texts, ids and images are given to the rows in turn."""
    rng = np.random.default_rng(0)
    count = len(names)
    if one_of:
        classes = rng.integers(0, count, rows)
        labels = (classes[:, None] == np.arange(count)).astype(np.int64)
        likely = np.exp(rng.normal(0, 1, labels.shape) + 1.5 * strength * labels)
        probabilities = likely / likely.sum(axis=1, keepdims=True)
        labels[rng.random(rows) < missing / 5] = MISSING
    else:
        labels = (rng.random((rows, count)) < np.linspace(0.15, 0.5, count)).astype(np.int64)
        margins = strength * (2 * labels - 1) * np.linspace(0.2, 2, count) + rng.normal(0, 1, labels.shape)
        probabilities = 1 / (1 + np.exp(-margins))
        labels[rng.random(labels.shape) < missing] = MISSING
    thresholds = None if one_of else [0.5] * count
    figures = panel_figures(
        names, labels, probabilities, np.arange(rows), thresholds=thresholds, resamples=resamples, seed=1
    )
    known = labels != MISSING
    facts = {"layers": "6", "tap": "mean:-1", "head": "linear", "label_names": ["0", "1"], "threshold": 0.5}
    facts |= {"temperature": 1.0, "isotonic": False, "abstention": None, "training": {}}
    drop = {"before": 0.9, "after": 0.6, "drop": 0.3, "low": 0.2, "high": 0.4}
    check: dict[str, Any] = {"reason": None, "rows": rows, "auroc": drop, "free": False}
    check["labels"] = [{"name": name, **drop, "low": -0.1} for name in names[:1]]
    evaluation: dict[str, Any] = {
        "panel_evaluation_version": 1,
        "sentence": "",
        "notes": [],
        "measured": {"panel": "parts/panel", "data": "data/test.csv", "date": "2026-01-31T12:00:00+00:00"},
        "rows": {
            "total": rows,
            "groups": rows,
            "with_picture": rows,
            "complete": int(known.all(axis=1).sum()),
            "unlabelled": int((~known.any(axis=1)).sum()),
        },
        **figures,
        "checks": {"images_permuted": check, "images_grey": check}
        | {"texts_permuted": {"reason": "all rows have the same text", "rows": 0, "auroc": None} | {"free": None}},
        "trained_on": {"known": True, "total": 0, "shown": [], "estimated_share": 0.0, "note": "none"},
        "panel": {"backbone": "builtin:tiny", "family": "qwen2_5_vl", "fingerprint": "0123abcd", "one_of": one_of}
        | {"temperature": 1.0, "labels": [{"name": name, **facts} for name in names]},
        "predictions": [],
    }
    for row in range(rows):
        entry: dict[str, Any] = {"row": row, "id": ids[row % len(ids)], "text": texts[row % len(texts)]}
        entry |= {"image": images[row % len(images)], "group": row}
        if one_of:
            own = np.flatnonzero(labels[row] == 1)
            entry["label"] = names[own[0]] if len(own) else None
            entry["answer"] = names[int(probabilities[row].argmax())]
        else:
            entry["labels"] = [None if label == MISSING else int(label) for label in labels[row]]
            entry["decisions"] = ["yes" if one >= 0.5 else "no" for one in probabilities[row]]
        evaluation["predictions"].append(entry | {"probabilities": probabilities[row].tolist()})
    evaluation["sentence"] = panel_sentence(evaluation)
    evaluation["notes"] = panel_notes(evaluation)
    return evaluation


def make_panel(backbone, names=("defect", "scratch", "dirty"), *, one_of=False) -> Panel:
    """Make a panel of linear heads with random weights."""
    spec = HeadSpec("linear", backbone.hidden_size)
    classifiers = []
    with torch.random.fork_rng(devices=[]):
        for seed, _ in enumerate(names):
            torch.manual_seed(seed)
            classifiers.append(Classifier(backbone, Tap(-1, "mean"), spec.build(), spec))
    return Panel(classifiers, names=names, one_of=one_of)


def labelled_rows(examples, names, *, gap=5):
    """Return examples with a column for each label: its own answers of a fixed pattern, every `gap`-th cell empty."""
    return [
        replace(
            example,
            label=None,
            fields={
                name: "" if (row + number) % gap == 0 else str(int((row // (number + 1)) % 2))
                for number, name in enumerate(names)
            },
        )
        for row, example in enumerate(examples)
    ]
