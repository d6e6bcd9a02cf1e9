"""Evaluations of the shape that `evaluate` returns, made by hand: what the tests of the report show."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.evaluation.curves import curves, threshold_table
from qwen_vl_classifier.evaluation.metrics import baselines, compute_metrics, confusion

HOSTILE = (
    "</script><img src=x onerror=document.title=1>",
    "</style><img src=//example.com/x onerror=alert(1)>",
    "\"><svg/onload=alert(1)>'",
    "</p></li></ol><iframe src=//example.com></iframe>",
    "{{ 7 * 7 }}{% raw %}{# gone #}",
    "&lt;b&gt; &amp;amp; &#x3c;",
    "<!-- --><base href=//example.com>]]>",
    "javascript:alert(1)",
    "\u202eright to left\u202c, мир, 图片 🙂\nsecond line",
    "\u202e never closed",
    "null\x00byte and \x1b[31m escape",
    "half a pair \ud83d",
    "Donau" + "dampfschiff" * 200,
)


def make_evaluation(labels, probabilities, *, texts=("a text",), ids=(None,), images=(None,), **classifier):
    """Make an evaluation; texts, ids and images are given to the rows in turn."""
    labels, probabilities = np.array(labels), np.array(probabilities, dtype=np.float64)
    setup: dict[str, Any] = {
        "backbone": "builtin:tiny",
        "family": "qwen2_5_vl",
        "layers": "6: full attention",
        "fingerprint": "0123abcd",
        "tap": "mean:-1",
        "head": "mlp",
        "label_names": ["0", "1"],
        "threshold": 0.5,
        "temperature": 1.0,
        "isotonic": False,
        "abstention": None,
        "training": {"method": "probe"},
        **classifier,
    }
    threshold, band = setup["threshold"], setup["abstention"]
    wrong = (probabilities >= threshold) != (labels == 1)
    surest = np.argsort(-np.abs(probabilities - threshold), kind="stable")
    nothing: dict[str, Any] = {"total": 0, "shown": []}
    return {
        "schema_version": 2,
        "sentence": f"Right on {np.mean(~wrong):.3f} of {len(labels)} examples.",
        "notes": [],
        "measured": {"classifier": "probe", "data": "data/test.csv", "date": "2026-01-31T12:00:00+00:00"},
        "rows": {
            "total": len(labels),
            "positives": int(labels.sum()),
            "negatives": int((1 - labels).sum()),
            "groups": len(labels),
            "with_picture": len(labels),
            "abstained": 0,
        },
        "metrics": {
            name: {"value": value, "low": value, "high": value}
            for name, value in compute_metrics(labels, probabilities, threshold).items()
        },
        "baselines": baselines(labels),
        "confusion": confusion(labels, probabilities, threshold),
        "classifier": setup,
        "curves": curves(labels, probabilities, threshold, band),
        "thresholds": threshold_table(labels, probabilities, threshold),
        "slices": [],
        "checks": {
            name: {"reason": "switched off", "rows": 0, "auroc": None, "accuracy": None, "free": None}
            for name in ("images_permuted", "images_grey", "texts_permuted")
        },
        "data": {
            **{
                name: {"within": nothing, "training": None}
                for name in ("exact_duplicates", "near_duplicates", "label_conflicts")
            },
            "pictures_in_training": None,
            "trained_on": {"known": True, "estimated_share": 0.0, "note": "None was trained on.", **nothing},
            "label_issues": {"reason": None, **nothing},
        },
        "examples": {
            "wrong": [int(row) for row in surest if wrong[row]],
            "uncertain": [int(row) for row in surest[::-1]][:48],
            "mislabelled": [],
        },
        "predictions": [
            {
                "row": row,
                "id": ids[row % len(ids)],
                "text": texts[row % len(texts)],
                "label": int(label),
                "probability": float(probability),
                "decision": "yes" if probability >= threshold else "no",
                "image": images[row % len(images)],
                "group": row,
                "slices": [],
            }
            for row, (label, probability) in enumerate(zip(labels, probabilities, strict=True))
        ],
    }


def random_evaluation(rows=200, **options):
    """Make an evaluation of a middling classifier."""
    rng = np.random.default_rng(0)
    labels = (rng.random(rows) < 0.4).astype(int)
    return make_evaluation(labels, rng.beta(1 + 2 * labels, 3 - 2 * labels), **options)


def full_evaluation(rows=200, **options):
    """Make an evaluation with something in each of its parts, all words in it hostile."""
    options = {"texts": HOSTILE, "ids": (*HOSTILE, None), "images": (*HOSTILE, None)} | options
    evaluation = random_evaluation(
        rows,
        label_names=list(HOSTILE[:2]),
        abstention=[0.4, 0.6],
        backbone=HOSTILE[2],
        training={HOSTILE[0]: HOSTILE[1]},
        **options,
    )
    drop = {"before": 0.9, "after": 0.6, "drop": 0.3, "low": 0.2, "high": 0.4}
    measured = {"reason": None, "rows": rows, "auroc": drop, "accuracy": drop, "free": False}
    pair = {"row": 7, "other": 3}
    found = {"total": 200, "shown": [pair] * 100}
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    return evaluation | {
        "measured": {"classifier": HOSTILE[0], "data": HOSTILE[2], "date": HOSTILE[1]},
        "sentence": HOSTILE[0],
        "notes": list(HOSTILE),
        "checks": {"images_permuted": measured, "images_grey": {**measured, "free": True}, "texts_permuted": measured},
        "slices": [
            {"name": name, "value": name, "rows": 20, "positives": 9, "accuracy": share, "rest": 0.8}
            | {"p_value": 0.01, "worse": True}
            for name in HOSTILE
        ],
        "data": {
            **{
                name: {"within": found, "training": found}
                for name in ("exact_duplicates", "near_duplicates", "label_conflicts")
            },
            "pictures_in_training": found,
            "trained_on": {"known": False, "total": 0, "shown": [], "estimated_share": None, "note": HOSTILE[0]},
            "label_issues": {
                "reason": None,
                "total": 1,
                "shown": [{"row": 5, "label": 1, "probability": 0.01}],
            },
        },
        "examples": {**evaluation["examples"], "mislabelled": [5]},
    }


def pictures(rows, size=(48, 32)):
    """Make examples with plain pictures, one for each row."""
    return [Example(Image.new("RGB", size, (row % 256, 99, 180)), "text", 1) for row in range(rows)]
