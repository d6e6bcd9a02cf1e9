"""Heads: folds in one batch are trained as each would be alone; heads for good take features as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from qwen_vl_classifier import TrainConfig
from qwen_vl_classifier.training.probe import heads
from qwen_vl_classifier.training.probe.heads import Standardised, linear_head, linear_margins, mlp_head, validate_mlp
from qwen_vl_classifier.training.splitting import folds

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(units=16, epochs=12, batch_size=16, learning_rate=3e-3, patience=12)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, targets that take more than a plane to tell apart, and weights."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 12)) * rng.uniform(0.1, 30, 12) + rng.normal(size=12) * 10
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    return x.astype(np.float32), (z[:, 0] * z[:, 1] + z[:, 2] > 0).astype(float), rng.uniform(0.5, 2, 120)


def parts_of(targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return folds(targets.astype(np.int64), np.arange(len(targets)), 5, 0)


def margins(head: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = head(torch.from_numpy(x)).numpy()
    return logits[:, 1] - logits[:, 0]


def test_folds_in_one_batch_are_trained_as_each_alone(data):
    x, targets, weights = data
    inputs = Standardised.of(x)
    # Of differing sizes, so that batches are filled up.
    parts = [np.arange(100), np.arange(20, 120), np.arange(37)]
    *_, together = heads._epochs(inputs, targets, weights, parts, CONFIG)
    for number, rows in enumerate(parts):
        *_, alone = heads._epochs(inputs, targets, weights, [rows], CONFIG)
        np.testing.assert_allclose(together.margins(number, inputs.inputs), alone.margins(0, inputs.inputs), atol=1e-4)
    assert (together.margins(0, inputs.inputs) - together.margins(1, inputs.inputs)).abs().max() > 0.1


def test_no_row_is_answered_by_a_head_that_saw_it(data):
    x, targets, weights = data
    rng = np.random.default_rng(1)
    noise = rng.normal(size=x.shape).astype(np.float32)
    found = validate_mlp(Standardised.of(noise), targets, weights, parts_of(targets), CONFIG)
    assert 0.35 < np.mean((found.margins > 0) == targets) < 0.65
    seen = mlp_head(Standardised.of(noise), targets, weights, 100, replace(CONFIG, epochs=100))[0]
    assert np.mean((margins(seen, noise) > 0) == targets) > 0.9


def test_the_mlp_head_learns_what_a_plane_cannot(data):
    x, targets, weights = data
    config = TrainConfig(units=64, epochs=100, batch_size=16, learning_rate=3e-3)
    found = validate_mlp(Standardised.of(x), targets, weights, parts_of(targets), config)
    assert np.mean((found.margins > 0) == targets) > 0.8
    assert 1 <= found.epochs <= 100
    head, spec = mlp_head(Standardised.of(x), targets, weights, found.epochs, config)
    assert (spec.kind, spec.units) == ("mlp", 64)
    assert np.mean((margins(head, x) > 0) == targets) > 0.85


def test_linear_margins_are_those_of_scikit_learn_out_of_fold(data):
    x, targets, weights = data
    inputs = Standardised.of(x)
    found = linear_margins(inputs, targets, weights, parts_of(targets), [1.0, 0.01])
    for line, l2 in zip(found, [1.0, 0.01], strict=True):
        for rows, held in parts_of(targets):
            model = LogisticRegression(C=1 / (l2 * weights[rows].sum()), tol=1e-8, max_iter=1000)
            model.fit(inputs.inputs[rows].double(), targets[rows], sample_weight=weights[rows])
            np.testing.assert_allclose(line[held], model.decision_function(inputs.inputs[held].double()), atol=1e-3)


def test_heads_take_features_as_they_are(data):
    x, targets, weights = data
    inputs = Standardised.of(x)
    head, spec = linear_head(inputs, targets, weights, 0.01)
    model = LogisticRegression(C=1 / (0.01 * weights.sum()), tol=1e-8, max_iter=1000)
    model.fit(inputs.inputs.double(), targets, sample_weight=weights)
    np.testing.assert_allclose(margins(head, x), model.decision_function(inputs.inputs.double()), atol=1e-3)
    assert (spec.kind, spec.hidden_size) == ("linear", 12)


@pytest.mark.parametrize("value", [0.0, 250.0])
def test_a_feature_that_was_constant_does_not_count_when_it_varies(data, value):
    x, targets, weights = data
    x = x.copy()
    x[:, 5] = np.float32(value) * (1 + 1e-7 * np.random.default_rng(0).normal(size=120)).astype(np.float32)
    moved = x.copy()
    moved[:, 5] += 0.01
    for head, _ in (
        linear_head(Standardised.of(x), targets, weights, 0.1),
        mlp_head(Standardised.of(x), targets, weights, 3, CONFIG),
    ):
        np.testing.assert_allclose(margins(head, moved), margins(head, x), atol=1e-6)


def test_focal_loss_makes_the_mlp_head_less_sure(data):
    x, targets, weights = data
    plain, focal = (
        margins(mlp_head(Standardised.of(x), targets, weights, 12, config)[0], x)
        for config in (CONFIG, TrainConfig(units=16, batch_size=16, learning_rate=3e-3, focal_gamma=3.0))
    )
    assert np.abs(focal).mean() < 0.8 * np.abs(plain).mean()


def test_random_numbers_of_the_caller_are_left_alone(data):
    x, targets, weights = data
    before = torch.get_rng_state()
    mlp_head(Standardised.of(x), targets, weights, 1, CONFIG)
    linear_head(Standardised.of(x), targets, weights, 1.0)
    assert torch.equal(torch.get_rng_state(), before)
