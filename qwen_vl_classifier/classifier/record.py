"""A training record in words, for people: anything may stand in it, so nothing is taken for granted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SENTENCES = (
    ("threshold", "objective", "{objective}"),
    (
        "calibration",
        "calibration",
        "{method} on {rows} rows, measured where it was not fitted: log loss {log_loss_before:.4f} before, "
        "{log_loss_after:.4f} after; ECE {ece_before:.4f} before, {ece_after:.4f} after",
    ),
    (
        "abstention",
        "decided",
        "{decided:.1%} of {rows} held-out rows; wrong: {error_of_all:.1%} of all, {error_of_decided:.1%} of decided",
    ),
    ("abstention", "guarantee", "{guarantee}"),
)


def training_facts(training: Mapping[str, Any]) -> dict[str, str]:
    """Return what a training record says, by name: its plain values, then objective, calibration and abstention.

    Lists and objects of other kinds are left out, and so is one that lacks what its sentence needs.
    """
    facts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in training.items()
        if not isinstance(value, (dict, list))
    }
    return facts | answer_facts(training)


def answer_facts(training: Mapping[str, Any]) -> dict[str, str]:
    """Return what a training record says of objective, calibration and abstention, by name, as `training_facts`."""
    facts = {}
    for key, name, sentence in _SENTENCES:
        entry = training.get(key)
        if isinstance(entry, dict):
            try:
                facts[name] = sentence.format_map(entry)
            except (KeyError, TypeError, ValueError):
                continue
    return facts
