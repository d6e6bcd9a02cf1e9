"""The search: what it tries, how it ranks, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Tap, TrainConfig
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.training.probe import search as module
from qwen_vl_classifier.training.probe.search import PENALTIES, Search, search

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(2, "mean"), Tap(-1, "mean"), Tap(-1, "last"), Tap(1, "image"), Tap(1, "text")]
SMALL = TrainConfig(units=8, epochs=5, batch_size=32)


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    """Features whose tap 2 knows the label and whose tap 1:image is empty, 1:text a copy of 1:mean."""
    rng = np.random.default_rng(0)
    targets = (np.arange(100) % 2).astype(float)
    x = rng.normal(size=(100, len(TAPS), 6)).astype(np.float32)
    x[:, 1, 0] += 2 * targets
    x[:, 4] = 0
    x[:, 5] = x[:, 0]
    return x, targets


def run(features, config: TrainConfig = SMALL, **options) -> Search:
    x, targets = features
    return search(x, targets, np.arange(len(targets)), TAPS, config, **options)


def test_every_tap_and_head_is_in_the_table_and_the_best_is_first(features):
    margins = np.random.default_rng(1).normal(size=100)
    found = run(features, zero_shot=margins)
    tried = {(row["tap"], row["head"]) for row in found.table}
    assert tried >= {(str(tap), "linear") for tap in TAPS[:4]}
    assert tried >= {("last:-1", "zero-shot"), ("last:-1", "calibrated"), ("mean:2", "mlp"), ("mean:-1", "mlp")}
    assert not {"image:1", "text:1"} & {tap for tap, _ in tried}
    assert len(found.candidates) == 2 + 4 * len(PENALTIES) + sum(head == "mlp" for _, head in tried)
    assert found.best.tap == Tap(2, "mean")
    assert found.folds == 5
    losses = [round(row["log_loss"], 4) for row in found.table]
    assert losses == sorted(losses)
    for row in found.table:
        assert 0 < row["log_loss_se"] < 0.3
        assert 0 < row["accuracy_se"] <= 0.06
        assert (row["l2"] is None) == (row["head"] != "linear")
        assert (row["epochs"] is None) == (row["head"] != "mlp")


def test_standard_errors_are_those_of_independent_groups(features):
    x, targets = features
    margins = np.random.default_rng(1).normal(size=100)
    losses = np.logaddexp(0, margins) - targets * margins
    config = TrainConfig(heads="zero-shot")
    (row,) = search(x, targets, np.arange(100), TAPS, config, zero_shot=margins).table
    assert row["log_loss_se"] == pytest.approx(losses.std(ddof=1) / 10)
    assert row["accuracy_se"] == pytest.approx(((margins >= 0) == targets).std(ddof=1) / 10)
    # The same rows twice tell nothing new if it is known that they are the same.
    twice = (np.repeat(values, 2, axis=0) for values in (x, targets, np.arange(100)))
    (again,) = search(*twice, TAPS, config, zero_shot=np.repeat(margins, 2)).table
    assert again == pytest.approx(row)


def test_calibrated_zero_shot_forgets_the_bias(features):
    targets = features[1]
    margins = 4 * targets + 6 + np.random.default_rng(0).normal(size=100)
    table = {
        row["head"]: row for row in run(features, TrainConfig(heads="zero-shot,calibrated"), zero_shot=margins).table
    }
    assert table["zero-shot"]["accuracy"] == 0.5
    assert table["calibrated"]["accuracy"] > 0.9
    assert table["calibrated"]["log_loss"] < 0.3
    assert table["zero-shot"]["auroc"] == pytest.approx(table["calibrated"]["auroc"], abs=0.02)


def test_ties_go_to_the_earlier_layer_then_to_the_simpler_head(features, monkeypatch):
    monkeypatch.setattr(module, "margin_losses", lambda margins, _: np.full(margins.shape, 0.5))
    found = run(features, zero_shot=np.zeros(100))
    order = [(row["tap"], row["head"]) for row in found.table]
    assert order[:4] == [("mean:1", "linear"), ("mean:1", "mlp"), ("mean:2", "linear"), ("mean:2", "mlp")]
    assert order[4:6] == [("last:-1", "zero-shot"), ("last:-1", "calibrated")]
    assert found.best.l2 == PENALTIES[0]


def test_heads_are_tried_as_asked(features):
    found = run(features, TrainConfig(heads="mlp", units=4, epochs=1))
    assert sorted(row["tap"] for row in found.table) == sorted(str(tap) for tap in TAPS[:4])
    assert {row["head"] for row in found.table} == {"mlp"}
    with pytest.raises(TrainingError, match=r"heads zero-shot: none of them .* add linear or mlp"):
        run(features, TrainConfig(heads="zero-shot"))


def test_weights_count_in_training_and_score(features):
    x, targets = features
    twice = np.where(np.arange(100) < 50, 1.0, 3.0)
    repeated = np.repeat(np.arange(100), twice.astype(int))
    linear = TrainConfig(heads="linear")
    weighted = search(x, targets, np.arange(100), TAPS, linear, weights=twice)
    often = search(x[repeated], targets[repeated], repeated, TAPS, linear)
    one, other = ({row["tap"]: row for row in found.table} for found in (weighted, often))
    # Folds differ, and with them the last digits.
    for tap in one:
        assert one[tap]["log_loss"] == pytest.approx(other[tap]["log_loss"], abs=0.05)
    assert weighted.table != run(features, linear).table


def test_broken_features_and_learning_rates_are_named(features):
    x, targets = features
    broken = x.copy()
    broken[3, 1, 0] = np.nan
    with pytest.raises(TrainingError, match=r"tap mean:2 .* look for broken features"):
        run((broken, targets))
    with pytest.raises(TrainingError, match=r"tap mean:2 gives NaN .* lower learning_rate"):
        run(features, TrainConfig(heads="linear,mlp", units=4, epochs=2, learning_rate=1e30))


def test_the_same_seed_finds_the_same(features):
    assert run(features).table == run(features).table
    assert run(features).table != run(features, TrainConfig(units=8, epochs=5, batch_size=32, seed=1)).table


def test_the_result_does_not_depend_on_how_many_problems_are_solved_side_by_side(features, monkeypatch):
    alone = run(features, SMALL)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = run(features, SMALL)
    for one, other in zip(alone.candidates, together.candidates, strict=True):
        assert (one.tap, one.head, one.l2, one.epochs) == (other.tap, other.head, other.l2, other.epochs)
        assert np.array_equal(one.margins, other.margins)
