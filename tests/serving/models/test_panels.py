"""Which classifiers share passes, and what a pass reads."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.backbone import Backbone as BackboneClass
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.serving.models.panels import ServedPanel, load_panels

EXAMPLE = Example(None, "words")


def test_classifiers_are_grouped_by_backbone_and_equal_processors_are_one(
    tmp_path: Path, tiny_classifier: Classifier
) -> None:
    shallow = copy.copy(tiny_classifier)
    shallow.tap = Tap(1, "mean")
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype="float32")
    with torch.no_grad():
        backbone.model.get_parameter("language_model.norm.weight").mul_(1.5)
    backbone.mark_changed()
    tuned = Classifier(backbone, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec)
    smaller = Backbone.load("builtin:tiny", device="cpu", dtype="float32", max_pixels=100_352)
    other = Classifier(smaller, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec)
    saved = {"deep": tiny_classifier, "tuned": tuned, "shallow": shallow, "smaller": other}
    folders = {name: str(classifier.save(tmp_path / name)) for name, classifier in saved.items()}
    first, second, third = load_panels(folders, "cpu")
    assert [list(group.classifiers) for group in (first, second, third)] == [
        ["deep", "shallow"],
        ["tuned"],
        ["smaller"],
    ]
    assert first.processor is second.processor
    assert third.processor is not first.processor
    for group in (first, second, third):
        for name, pair in group.score_example(EXAMPLE).items():
            np.testing.assert_allclose(pair, saved[name].predict_proba([EXAMPLE])[0], rtol=0, atol=1e-6)


def test_a_pass_reads_no_tap_that_nobody_asked_for(
    tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = copy.copy(tiny_classifier)
    shallow.tap = Tap(1, "mean")
    group = ServedPanel({"deep": tiny_classifier, "shallow": shallow})
    read: list[list[Tap]] = []
    encode = BackboneClass.encode_prepared

    def watched(backbone: Backbone, prepared: list, taps: list[Tap]) -> np.ndarray:
        read.append(taps)
        return encode(backbone, prepared, taps)

    monkeypatch.setattr(BackboneClass, "encode_prepared", watched)
    encoded = group.processor.encode(EXAMPLE)
    (one,) = group.score([(encoded, ("shallow",))])
    both, none = group.score([(encoded, ("shallow", "deep")), (encoded, ())])
    assert read == [[Tap(1, "mean")], [Tap(-1, "mean"), Tap(1, "mean")]]
    assert one["shallow"] == pytest.approx(both["shallow"], abs=1e-6)
    assert (list(both), none) == (["shallow", "deep"], {})


def test_a_folder_that_holds_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        load_panels({"none": str(tmp_path)}, "cpu")
