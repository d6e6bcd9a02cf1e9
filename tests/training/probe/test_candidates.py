"""Which taps a search tries."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qwen_vl_classifier import Tap
from qwen_vl_classifier.backbone.taps import POOLINGS
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.training.probe.candidates import Candidate, candidate_taps, distinct_taps


def deep(layers: int, total: int | None = None) -> SimpleNamespace:
    """Stand in for a backbone of some depth."""
    return SimpleNamespace(num_layers=layers, total_layers=total or layers, check_taps=lambda taps: taps)


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        (deep(6), [1, 2, 3, 4, 5, 6, -1]),
        (deep(1), [1, -1]),
        (deep(36), [4, 9, 14, 18, 22, 27, 32, -1]),
        (deep(28), [4, 7, 10, 14, 18, 21, 24, -1]),
        (deep(24, total=36), [3, 6, 9, 12, 15, 18, 21, 24]),
        (deep(2, total=36), [1, 2]),
    ],
)
def test_auto_is_spread_over_the_depth_times_all_poolings(backbone, layers):
    assert candidate_taps("auto", backbone) == [Tap(layer, pooling) for layer in layers for pooling in POOLINGS]


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [(deep(6), [1, 2, 3, 4, 5, -1]), (deep(36), [4, 9, 14, 18, 22, 27, 32, -1]), (deep(2, total=36), [1, 2])],
)
def test_exportable_taps_read_the_same_layers_through_the_final_norm(backbone, layers):
    taps = candidate_taps("auto", backbone, exportable=True)
    assert taps == [Tap(layer, pooling, normed=True) for layer in layers for pooling in ("mean", "last")]
    assert all(tap.exportable for tap in taps)


def test_a_tap_that_cannot_be_exported_is_refused_where_that_matters(tiny_backbone):
    with pytest.raises(ConfigError, match=r"tap image:2 with exportable=True: .*; give mean:2:normed or last:2:normed"):
        candidate_taps("mean:-1,image:2", tiny_backbone, exportable=True)
    assert candidate_taps("mean:2:normed,last:-1", tiny_backbone, exportable=True)


def test_a_list_names_each_tap_once(tiny_backbone):
    assert candidate_taps("mean:-1, last:2,mean:-1", tiny_backbone) == [Tap(-1, "mean"), Tap(2, "last")]


@pytest.mark.parametrize("text", ["", "mean", "mean:", "max:3", "mean:99", "mean:0"])
def test_what_is_no_tap_of_this_backbone_is_refused(tiny_backbone, text):
    with pytest.raises(ConfigError, match="tap"):
        candidate_taps(text, tiny_backbone)


def test_empty_and_equal_features_are_not_tried_twice():
    taps = [Tap(-1, "mean"), Tap(1, "image"), Tap(1, "mean"), Tap(1, "text"), Tap(2, "mean")]
    x = np.random.default_rng(0).normal(size=(5, 5, 3)).astype(np.float32)
    x[:, 1] = 0
    x[:, 3] = x[:, 2]
    assert distinct_taps(x, taps) == [2, 4, 0]
    assert distinct_taps(np.zeros((5, 5, 3), dtype=np.float32), taps) == [2]


def test_cost_orders_by_layer_then_head():
    order = [(1, "mlp"), (2, "linear"), (2, "mlp"), (-1, "zero-shot"), (-1, "calibrated"), (-1, "linear")]
    made = [Candidate(Tap(layer, "last"), head, np.zeros(1)) for layer, head in order]
    assert sorted([*made[3:], *made[:3]], key=Candidate.cost) == made
