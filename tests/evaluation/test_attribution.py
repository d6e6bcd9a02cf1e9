"""Gradients along the path: what they add up to in every family, and what enters the decoder on the way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.packing import pack
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.evaluation.attribution import (
    along_the_path,
    average_pictures,
    empty_pictures,
)
from qwen_vl_classifier.evaluation.explanation import explain
from qwen_vl_classifier.evaluation.interventions import (
    kept_experts,
    recorded_entries,
    recorded_experts,
    replaced_entries,
)
from tests import nano
from tests.evaluation.explained import TAPS, TEXT, log_odds_of, make_classifier, total

pytestmark = pytest.mark.usefixtures("one_thread")

SMOOTH = tuple(family for family in nano.FAMILIES if family not in nano.HYBRID)
"""Families whose random models are smooth enough for sums over 32 points of a long way."""


def at_taps(*families: str) -> pytest.MarkDecorator:
    """Try every tap with the first family, and the last token, which hears everything, with the others."""
    pairs = [(families[0], tap) for tap in TAPS] + [(family, TAPS[-1]) for family in families[1:]]
    return pytest.mark.parametrize(("nano_checkpoint", "tap"), pairs, indirect=["nano_checkpoint"], ids=str)


def log_odds_with_experts_of(classifier: Classifier, example: EncodedExample, other: EncodedExample) -> float:
    """Return the log odds of an example whose tokens have the experts of another one's, if there are any."""
    backbone = classifier.backbone
    layers = backbone.model.language_model.layers
    example, other = (pack(backbone.processor, [one], ((0,),), backbone.device) for one in (example, other))
    with torch.no_grad():
        with recorded_experts(layers) as experts:
            pooled_states(backbone.model, other, [classifier.tap])
        with kept_experts(layers, experts):
            feature = pooled_states(backbone.model, example, [classifier.tap])[:, 0]
    negative, positive = classifier.logits_of(feature.numpy())[0]
    return float(positive - negative)


def without_words(backbone: Backbone, encoded: EncodedExample) -> list[int]:
    """Return the tokens of an example with padding in place of its text."""
    start, end = encoded.spans.text
    return [*encoded.ids[:start], *[backbone.processor.pad_token_id] * (end - start), *encoded.ids[end:]]


@at_taps(*SMOOTH)
def test_gradients_add_up_to_the_difference_from_a_blank_picture_and_no_words(nano_checkpoint, wide_picture, tap):
    _, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    classifier = make_classifier(backbone, tap)
    example = Example((wide_picture, wide_picture.resize((60, 150))), TEXT)
    (encoded,) = backbone.prepare([example])
    processor = backbone.processor
    found = along_the_path(classifier, encoded, empty_pictures(encoded.pictures, processor), steps=32).run()
    colours = [np.median(pixels.reshape(-1, 3), axis=0).round().astype(np.uint8) for pixels in encoded.pictures.pixels]
    assert all(colour.any() for colour in colours)
    plain = [np.full_like(pixels, colour) for pixels, colour in zip(encoded.pictures.pixels, colours, strict=True)]
    blank = processor.take_pictures(plain)
    nothing = replace(encoded, ids=without_words(backbone, encoded), pictures=blank)
    change = found.log_odds - log_odds_with_experts_of(classifier, nothing, encoded)
    assert found.tokens.sum() == pytest.approx(change, abs=1e-3 * np.abs(found.tokens).sum())
    assert found.tokens.sum() + found.missed == pytest.approx(change, abs=1e-4)


@pytest.mark.parametrize(
    ("share", "text", "steps"), [(0.02, "", 8), pytest.param(1, TEXT, 512, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("nano_checkpoint", nano.HYBRID, indirect=True)
def test_gradients_pass_through_layers_of_linear_attention(nano_checkpoint, wide_picture, share, text, steps):
    """What picture tokens leave in the state of these layers counts; random models need many steps or a short way."""
    _, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    classifier = make_classifier(backbone, Tap(-1, "last"))
    (encoded,) = backbone.prepare([Example(wide_picture, text)])
    (pixels,) = encoded.pictures.pixels
    (empty,) = empty_pictures(encoded.pictures, backbone.processor).pixels
    between = (pixels + share * (empty.astype(float) - pixels)).round().astype(np.uint8)
    assert (between != pixels).any()
    near = backbone.processor.take_pictures([between])
    found = along_the_path(classifier, encoded, near, steps=steps).run()
    nothing = replace(encoded, ids=without_words(backbone, encoded), pictures=near)
    change = found.log_odds - log_odds_with_experts_of(classifier, nothing, encoded)
    assert found.tokens.sum() == pytest.approx(change, abs=1e-3 * np.abs(found.tokens).sum())
    assert found.tokens.sum() + found.missed == pytest.approx(change, abs=1e-4)
    assert np.abs(found.tokens).sum() > 1e-4


def test_a_way_that_the_steps_miss_much_of_is_warned_of(tiny_backbone, wide_picture):
    plain = explain(make_classifier(tiny_backbone, Tap(-1, "last")), Example(wide_picture, TEXT))
    assert not any("abruptly" in line for line in plain.summary())
    rough = replace(plain, missed=1.0, log_odds=plain.log_odds + 1, rest=plain.rest + 1)
    _, start, warning, *_ = rough.summary()
    assert start == plain.summary()[1]
    assert warning.startswith(f"warning: the log odds are {rough.log_odds:+.3g}, and change abruptly on the way")
    assert "miss +1; compare with occlusion" in warning


@pytest.mark.parametrize("nano_checkpoint", nano.EXPERTS, indirect=True)
def test_tokens_keep_the_experts_that_they_have_in_the_example(nano_checkpoint, wide_picture):
    _, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    classifier = make_classifier(backbone, Tap(-1, "mean"))
    example = Example(wide_picture, TEXT)
    (encoded,) = backbone.prepare([example])
    same = log_odds_with_experts_of(classifier, encoded, encoded)
    assert same == pytest.approx(log_odds_of(classifier, example), abs=1e-5)
    empty = replace(encoded, pictures=empty_pictures(encoded.pictures, backbone.processor))
    assert abs(log_odds_with_experts_of(classifier, encoded, empty) - same) > 1e-3
    start = explain(classifier, example).summary()[1]
    assert start.startswith("an empty picture of one colour without words (with the experts that this example uses): ")
    assert not backbone.model.language_model.layers[0].mlp.gate._forward_hooks


def test_fewer_steps_miss_little(tiny_backbone, wide_picture):
    classifier = make_classifier(tiny_backbone, Tap(-1, "last"))
    (encoded,) = tiny_backbone.prepare([Example(wide_picture, TEXT)])
    empty = empty_pictures(encoded.pictures, tiny_backbone.processor)
    usual, fine = (along_the_path(classifier, encoded, empty, steps=steps).run().tokens for steps in (16, 64))
    np.testing.assert_allclose(usual, fine, atol=0.1 * np.abs(fine).max())


def test_what_enters_between_layers_is_recorded_and_replaced():
    layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(3)]
    start, injected = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    with torch.no_grad(), recorded_entries(layers) as entries:
        output = layers[2](layers[1](layers[0](start)) + injected)
    assert list(entries) == [0, 2]
    torch.testing.assert_close(entries[2], injected)
    with torch.no_grad(), replaced_entries(layers, entries):
        again = layers[2](layers[1](layers[0](torch.zeros(1, 2, 3))))
    torch.testing.assert_close(again, output)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)


def test_picture_features_of_qwen3_enter_its_later_layers(nano_checkpoint, wide_picture):
    family, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    with torch.no_grad(), recorded_entries(backbone.model.language_model.layers) as entries:
        backbone.encode_batch(backbone.processor([Example(wide_picture, TEXT)]), [Tap(-1, "last")])
    assert list(entries) == ([0, 1, 2] if family in ("qwen3_vl", "qwen3_vl_moe") else [0])


@at_taps("qwen2_5_vl", "qwen3_vl_moe")
def test_gradients_add_up_to_the_difference_from_the_average_picture(nano_checkpoint, wide_picture, average, tap):
    _, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    classifier = make_classifier(backbone, tap, average=average)
    pictures = (wide_picture, wide_picture.resize((60, 150)))
    (encoded,) = backbone.prepare([Example(pictures, TEXT)])
    side = backbone.processor.image_processor.patch_size
    sizes = [(width * side, height * side) for _, height, width in encoded.pictures.grids]
    averages = tuple(average.resize(size, Image.Resampling.BICUBIC) for size in sizes)
    (usual,) = backbone.prepare([Example(averages, TEXT)])
    nothing = replace(usual, ids=without_words(backbone, encoded), pictures=replace(usual.pictures, key=b"usual"))
    found = along_the_path(
        classifier, encoded, average_pictures(average, encoded.pictures, backbone.processor), steps=32
    ).run()
    change = found.log_odds - log_odds_with_experts_of(classifier, nothing, encoded)
    assert found.tokens.sum() == pytest.approx(change, abs=1e-3 * np.abs(found.tokens).sum())
    explained = explain(classifier, Example(pictures, TEXT))
    assert explained.baseline == "average"
    assert total(explained) + explained.rest == pytest.approx(explained.log_odds, abs=1e-5)
