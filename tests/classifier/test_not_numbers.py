"""NaN and infinity between pixels and probabilities are an error: never a probability, a label or a kept feature."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ArtifactError, ImageError
from qwen_vl_classifier.evaluation.compare import compare
from qwen_vl_classifier.evaluation.evaluation import evaluate
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.images.opening import open_image

ROWS = [Example(None, f"claim {row}", label=row % 2) for row in range(4)]
MESSAGE = "the answers for 1 of 4 rows, the first at position 2, are NaN or infinite; "


@pytest.fixture(params=[np.nan, np.inf, -np.inf])
def spoiled(request, monkeypatch):
    """Make one feature of the third distinct example of a pass something else than a number."""
    encode = Backbone.encode_prepared

    def spoiling(self, prepared, taps, **options):
        features = encode(self, prepared, taps, **options)
        if len(features) > 2:
            features[2, :, 0] = request.param
        return features

    monkeypatch.setattr(Backbone, "encode_prepared", spoiling)


@pytest.mark.usefixtures("spoiled")
def test_they_become_no_answer(tiny_classifier):
    for ask in (tiny_classifier.predict_proba, tiny_classifier.predict, tiny_classifier.decide):
        with pytest.raises(ArtifactError, match=MESSAGE):
            ask(ROWS)
    with pytest.raises(ArtifactError, match=MESSAGE):
        Panel([tiny_classifier]).predict_proba(ROWS)
    with pytest.raises(ArtifactError, match="are NaN or infinite"):
        tiny_classifier.calibrate(ROWS)
    with pytest.raises(ArtifactError, match="are NaN or infinite"):
        evaluate(tiny_classifier, ROWS, config=EvaluateConfig(resamples=10))
    with pytest.raises(ArtifactError, match="are NaN or infinite"):
        compare([tiny_classifier, tiny_classifier], ROWS, config=EvaluateConfig(resamples=10))


def test_they_are_not_kept(tiny_classifier, tmp_path):
    store = FeatureStore(tmp_path / "features")
    with pytest.MonkeyPatch.context() as patch:
        encode = Backbone.encode_prepared

        def spoiling(self, prepared, taps, **options):
            features = encode(self, prepared, taps, **options)
            features[2] = np.nan
            return features

        patch.setattr(Backbone, "encode_prepared", spoiling)
        with pytest.raises(ArtifactError):
            tiny_classifier.predict_proba(ROWS, store=store)
    assert len(store) == 3
    assert np.isfinite(tiny_classifier.predict_proba(ROWS, store=store)).all()
    assert len(store) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, 0.5])
def test_pixels_without_a_range_are_refused(tiny_classifier, value):
    picture = Image.fromarray(np.full((30, 40), value, dtype=np.float32))
    assert picture.mode == "F"
    with pytest.raises(ImageError, match="no fixed range of values; expected 8-bit or 16-bit pixels"):
        open_image(picture)
    with pytest.raises(ImageError, match="no fixed range"):
        tiny_classifier.predict_proba([Example(picture, "A claim.")])


def test_arrays_are_refused():
    with pytest.raises(ImageError, match="is of type ndarray; expected a path, bytes or a PIL image; convert it"):
        open_image(np.zeros((3, 3, 3)))
