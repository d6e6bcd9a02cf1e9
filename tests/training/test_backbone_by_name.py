"""A backbone is given as an object, or by its name or folder: the same result."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier import Backbone, Classifier, Tap, TrainConfig, extract_features, finetune, train
from qwen_vl_classifier.errors import QwenVLClassifierError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def loaded(tiny_backbone, monkeypatch) -> list[str]:
    """The names that are loaded meanwhile; each of them is the built-in backbone."""
    names: list[str] = []

    def load(name, **_options):
        names.append(name)
        return tiny_backbone

    monkeypatch.setattr(Backbone, "load", load)
    return names


def test_train_takes_a_name(loaded, tiny_backbone, scene_rows):
    config = TrainConfig(taps="mean:-1", heads="linear")
    rows = scene_rows[:30]
    by_name = train(rows, backbone="builtin:tiny", config=config, progress=False).classifier
    by_object = train(rows, backbone=tiny_backbone, config=config, progress=False).classifier
    assert loaded == ["builtin:tiny"]
    np.testing.assert_array_equal(by_name.predict_proba(rows), by_object.predict_proba(rows))


def test_zero_shot_and_features_take_a_name(loaded, tiny_backbone, scene_rows):
    assert Classifier.zero_shot("builtin:tiny").backbone is tiny_backbone
    features = extract_features(scene_rows[:2], "builtin:tiny", [Tap(-1, "mean")], progress=False)
    np.testing.assert_array_equal(features, tiny_backbone.encode(scene_rows[:2], [Tap(-1, "mean")]))
    assert loaded == ["builtin:tiny", "builtin:tiny"]


def test_a_name_that_does_not_exist_is_one_line(scene_rows):
    with pytest.raises(QwenVLClassifierError, match="builtin:tinny"):
        train(scene_rows[:30], backbone="builtin:tinny", progress=False)


def test_finetune_starts_from_the_folder_of_a_classifier(loaded, tmp_path, scene_rows):
    folder = Classifier.zero_shot("builtin:tiny").save(tmp_path / "start")
    del loaded[:]
    with pytest.raises(QwenVLClassifierError, match="no label"):
        finetune(folder, [{"image": None, "text": "A claim."}])
    with pytest.raises(QwenVLClassifierError, match="no label"):
        finetune("builtin:tiny", [{"image": None, "text": "A claim."}])
    assert loaded == ["builtin:tiny", "builtin:tiny"]
