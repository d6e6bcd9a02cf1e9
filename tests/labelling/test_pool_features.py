"""Features of a pool: inputs of heads, answers on all rows, and sketches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Tap
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.labelling.pool_features import AXES, SKETCH, PoolFeatures
from tests.labelling.separable import TAPS, separable

pytestmark = pytest.mark.usefixtures("one_thread")


def wide(rows: int = 60) -> PoolFeatures:
    rng = np.random.default_rng(0)
    few = rng.normal(size=(rows, 20)) @ rng.normal(size=(20, AXES + 40))  # so few axes that all of them are kept
    return PoolFeatures((few + 0.3)[:, None].astype(np.float32), [Tap(1, "mean")], np.arange(rows))


@pytest.mark.parametrize("pool", [separable()[0], wide()], ids=["narrow", "wide"])
def test_a_head_on_inputs_is_the_same_head_on_features(pool):
    tap = pool.taps[0]
    inputs = pool.inputs(tap, np.arange(len(pool)))
    assert inputs.shape[1] <= AXES
    coefficients = np.random.default_rng(1).normal(size=inputs.shape[1])
    margins = pool.margins(tap, *pool.unfolded(tap, coefficients, 0.7))
    assert margins == pytest.approx((inputs.double().numpy() @ coefficients) + 0.7, abs=1e-3)


def test_inputs_have_the_mean_and_deviation_of_the_pool():
    pool, _ = separable()
    everything = pool.inputs(TAPS[0], np.arange(len(pool)))
    assert everything.mean(dim=0).numpy() == pytest.approx(0, abs=1e-5)
    assert everything.std(dim=0, correction=0).numpy() == pytest.approx(1, abs=1e-5)
    some = np.array([4, 2])
    assert torch.equal(pool.inputs(TAPS[0], some), everything[some])


def test_sketches_keep_products():
    pool = wide()
    points, inputs = pool.sketch(pool.taps[0]), pool.inputs(pool.taps[0], np.arange(len(pool))).numpy()
    assert points.points.shape == (len(pool), SKETCH + 1)
    assert (points.points[:, -1] == 1).all()
    kept = points.points[:, :-1] @ points.points[:, :-1].T
    assert np.corrcoef(kept.ravel(), (inputs @ inputs.T).ravel())[0, 1] > 0.85
    assert points.moment == pytest.approx(points.points.T @ points.points / len(pool), rel=1e-3, abs=1e-3)
    assert pool.sketch(pool.taps[0]) is points


def test_taps_that_say_the_same_are_tried_once():
    features = np.random.default_rng(0).normal(size=(30, 3, 4)).astype(np.float32)
    features[:, 2] = features[:, 1]
    features[:, 0] = 0
    pool = PoolFeatures(features, [Tap(2, "image"), Tap(1, "mean"), Tap(1, "last")], np.arange(30) // 2 * 7)
    assert pool.distinct == [Tap(1, "mean")]
    assert pool.groups.tolist() == (np.arange(30) // 2).tolist()


def test_features_that_are_not_finite_are_refused():
    features = np.ones((5, 1, 2), dtype=np.float32)
    features[3] = np.nan
    with pytest.raises(TrainingError, match="mean:1 hold NaN or infinity"):
        PoolFeatures(features, [Tap(1, "mean")], np.arange(5)).inputs(Tap(1, "mean"), np.arange(5))
