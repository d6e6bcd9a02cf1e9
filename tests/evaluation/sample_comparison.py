"""Comparisons of the shape that `compare` returns, made by hand: what the tests of their page show."""

from __future__ import annotations

import itertools

import numpy as np

from qwen_vl_classifier.evaluation.metrics import METRICS, baselines, compute_metrics, confusion


def make_comparison(rows=60, names=("one", "two", "three"), *, better=None, texts=("a text",), ids=(None,)):
    """Make a comparison of classifiers, each noisier than the one before it; texts and ids are given in turn."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 2
    columns = [
        np.clip(0.3 + 0.4 * labels + rng.normal(0, 0.2 + 0.2 * place, rows), 0.01, 0.99) for place in range(len(names))
    ]
    answers = [(column >= 0.5).astype(int) for column in columns]
    spread = np.ptp(columns, axis=0)
    differing = [int(row) for row in np.argsort(-spread) if len({int(answer[row]) for answer in answers}) > 1]
    values = [compute_metrics(labels, column, 0.5) for column in columns]
    return {
        "comparison_version": 2,
        "sentence": "No difference is shown.",
        "notes": [],
        "measured": {"data": "/home/me/secret/test.csv", "date": "2026-11-28T20:50:03+00:00"},
        "rows": {"total": rows, "positives": int(labels.sum()), "negatives": int((1 - labels).sum()), "groups": rows},
        "label_names": ["mixed", "matching"],
        "baselines": baselines(labels),
        "classifiers": [
            {
                "mark": "ABCDEFG"[place],
                "name": name,
                "rank": place + 1,
                "metrics": {key: {"value": value, "low": value, "high": value} for key, value in values[place].items()},
                "confusion": confusion(labels, columns[place], 0.5),
                "backbone": "builtin:tiny",
                "tap": "last:2",
                "label_names": ["mixed", "matching"],
                "threshold": 0.5,
                "training": {"method": "probe"},
            }
            for place, name in enumerate(names)
        ],
        "ranking": list(range(len(names))),
        "pairs": [
            {
                "a": a,
                "b": b,
                "metrics": {
                    key: {"a": 0.9, "b": 0.8, "difference": 0.1, "low": -0.05, "high": 0.2, "better": better}
                    for key in METRICS
                },
                "mcnemar": {"both": 40, "only_a": 9, "only_b": 7, "neither": 4, "p_value": 0.4, "p_corrected": 0.8},
            }
            for a, b in itertools.combinations(range(len(names)), 2)
        ],
        "correction": {"method": "Holm" if len(names) > 2 else None, "comparisons": len(names)},
        "differing": [
            {
                "row": row,
                "id": ids[row % len(ids)],
                "text": texts[row % len(texts)],
                "image": f"/home/me/secret/{row}.png",
                "label": int(labels[row]),
                "group": row,
                "probabilities": [float(column[row]) for column in columns],
                "labels": [int(answer[row]) for answer in answers],
                "decisions": ["yes" if answer[row] else "no" for answer in answers],
            }
            for row in differing
        ],
    }
