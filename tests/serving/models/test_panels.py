"""Which classifiers share passes, and what a pass reads."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.backbone import Backbone as BackboneClass
from qwen_vl_classifier.serving.models.panels import ServedPanel

EXAMPLE = Example(None, "words")


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
