"""Panel: one pass serves all members, with what each would have said alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.classifier.probabilities import log_odds
from qwen_vl_classifier.errors import ConfigError
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [
    Example(Image.new("RGB", (84, 56), "red"), "a red picture"),
    Example(Image.new("RGB", (56, 112), "navy"), "a red picture"),
    Example(Image.new("RGB", (56, 112), "navy"), "a long text that says that it is blue"),
    Example(None, "no picture"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint", tied=True)


@pytest.fixture(scope="module")
def backbone(checkpoint) -> Backbone:
    return Backbone.load(checkpoint, device="cpu", dtype="float32")


def classifier_at(backbone: Backbone, tap: Tap, seed: int = 0, **options) -> Classifier:
    """A classifier with random weights, large enough that its probabilities differ."""
    torch.manual_seed(seed)
    spec = HeadSpec("mlp", backbone.hidden_size, units=16, dropout=0.1)
    head = spec.build()
    torch.nn.init.normal_(head[3].weight, std=2)
    return Classifier(backbone, tap, head, spec, **options)


def members_of(backbone: Backbone) -> list[Classifier]:
    return [
        classifier_at(backbone, Tap(2, "last"), seed=1, temperature=0.5),
        Classifier.zero_shot(backbone),
        classifier_at(backbone, Tap(2, "last"), seed=2),
        classifier_at(backbone, Tap(-1, "image"), seed=3),
        classifier_at(backbone, Tap(1, "text"), seed=4),
    ]


def test_a_panel_equals_its_members(backbone, monkeypatch):
    members = members_of(backbone)
    wanted = np.stack([member.predict_proba(EXAMPLES)[:, 1] for member in members], axis=1)
    calls = []
    encode = backbone.encode_prepared

    def counting(prepared, taps, **options):
        calls.append(len(taps))
        return encode(prepared, taps, **options)

    monkeypatch.setattr(backbone, "encode_prepared", counting)
    seen = Panel(members).predict_proba(EXAMPLES)
    assert calls == [4]  # two members share a tap
    # Heads at one tap are one product, whose sums may be taken in another order.
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(log_odds(seen), log_odds(wanted), rtol=0, atol=1e-5)
    assert len({tuple(column) for column in seen.T}) == 5


def test_saved_members_share_one_backbone(backbone, tmp_path):
    members = members_of(backbone)
    folders = [member.save(tmp_path / str(number)) for number, member in enumerate(members)]
    panel = Panel.load(folders, device="cpu")
    assert len({id(member.backbone) for member in panel.classifiers}) == 1
    np.testing.assert_allclose(panel.predict_proba(EXAMPLES), Panel(members).predict_proba(EXAMPLES), rtol=1e-6)


def test_no_deeper_than_the_deepest_tap(backbone, tmp_path):
    folders = [classifier_at(backbone, tap).save(tmp_path / str(tap.layer)) for tap in (Tap(1, "mean"), Tap(3, "mean"))]
    panel = Panel.load(folders, device="cpu")
    assert panel.backbone.num_layers == 3
    assert [member.tap.layer for member in panel.classifiers] == [1, 3]
    apart = Panel([Classifier.load(folder, device="cpu") for folder in folders])
    assert apart.backbone.num_layers == 3
    np.testing.assert_array_equal(apart.predict_proba(EXAMPLES), panel.predict_proba(EXAMPLES))


def test_the_last_norm_is_deeper_than_any_layer(backbone, checkpoint):
    part = Backbone.load(checkpoint, device="cpu", dtype="float32", num_layers=3)
    panel = Panel([classifier_at(part, Tap(3, "mean")), classifier_at(backbone, Tap(-1, "mean"))])
    assert panel.backbone is backbone
    assert panel.predict_proba(EXAMPLES).shape == (4, 2)


def test_other_backbones_are_refused_before_any_is_loaded(backbone, tmp_path, monkeypatch):
    other = Backbone.load(nano.make_checkpoint("qwen2_5_vl", tmp_path / "other", seed=1), device="cpu", dtype="float32")
    members = [classifier_at(backbone, Tap(1, "mean")), classifier_at(other, Tap(1, "mean"))]
    with pytest.raises(ConfigError, match="one panel for each backbone"):
        Panel(members)
    folders = [member.save(tmp_path / f"saved{number}") for number, member in enumerate(members)]
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="one panel for each backbone") as caught:
        Panel.load(folders)
    assert all(str(folder) in str(caught.value) for folder in folders)


def test_other_pixel_limits_are_another_backbone(backbone, checkpoint):
    smaller = Backbone.load(checkpoint, device="cpu", dtype="float32", max_pixels=4000)
    with pytest.raises(ConfigError, match="other settings"):
        Panel([classifier_at(backbone, Tap(1, "mean")), classifier_at(smaller, Tap(1, "mean"))])


def test_no_members():
    with pytest.raises(ConfigError, match="at least one"):
        Panel([])
    with pytest.raises(ConfigError, match="at least one"):
        Panel.load([])


def test_no_examples(backbone):
    assert Panel(members_of(backbone)).predict_proba([]).shape == (0, 5)
