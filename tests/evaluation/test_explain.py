"""Explanations: contributions against transformers' own forward pass, sums, words, and heat maps."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.evaluation.explain import (
    ACTIVATION_MAPPING,
    GRADIENT_INPUT,
    _recorded_entries,
    explain,
    heat_map,
    join_words,
)

TAPS = [Tap(-1, "mean"), Tap(2, "image"), Tap(3, "text"), Tap(-1, "last")]
TEXT = "There are at least two red circles."


@pytest.fixture(scope="module")
def wide_picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (84, 140, 3), dtype=np.uint8))


def make_classifier(backbone: Backbone, tap: Tap, kind: str = "linear", temperature: float = 1.0) -> Classifier:
    spec = HeadSpec(kind, backbone.hidden_size, units=32 if kind == "mlp" else 0)
    return Classifier(backbone, tap, spec.build(), spec, temperature=temperature)


def total(explanation) -> float:
    """Add up all contributions."""
    pictures = sum(float(grid.sum()) for grid in explanation.patches)
    return pictures + sum(value for _, value in explanation.words) + explanation.template


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("tap", TAPS, ids=str)
def test_the_probability_is_that_of_the_classifier(tiny_backbone, mixed_examples, kind, tap):
    classifier = make_classifier(tiny_backbone, tap, kind, temperature=0.7)
    for example in mixed_examples:
        explanation = explain(classifier, example)
        assert explanation.probability == pytest.approx(classifier.predict_proba([example])[0, 1], abs=1e-6)
        log_odds = np.log(explanation.probability / (1 - explanation.probability))
        assert explanation.log_odds == pytest.approx(log_odds, abs=1e-5)
        assert total(explanation) + explanation.rest == pytest.approx(log_odds, abs=1e-5)
        assert len(explanation.patches) == len(example.images)
        assert "".join(word for word, _ in explanation.words) == "".join(example.text.split())


@pytest.mark.parametrize("tap", [Tap(-1, "mean"), Tap(2, "mean"), Tap(-1, "image")], ids=str)
def test_contributions_of_a_linear_head_add_up_to_the_logits_without_bias(tiny_backbone, wide_picture, tap):
    classifier = make_classifier(tiny_backbone, tap, temperature=2.0)
    explanation = explain(classifier, Example(wide_picture, TEXT))
    bias = classifier.head.bias[1] - classifier.head.bias[0]
    assert explanation.exact
    assert explanation.method == ACTIVATION_MAPPING
    assert total(explanation) == pytest.approx(explanation.log_odds - float(bias.detach()) / 2, abs=1e-5)
    assert abs(total(explanation)) > 1e-3


def test_each_contribution_equals_the_hidden_states_of_transformers(nano_checkpoint, wide_picture):
    _, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    classifier = make_classifier(backbone, Tap(-1, "mean"))
    example = Example((wide_picture, wide_picture.resize((60, 150))), TEXT)
    inputs = backbone.processor([example])
    with torch.no_grad():
        states = backbone.model(**inputs).last_hidden_state[0]
        weight = classifier.head.weight[1] - classifier.head.weight[0]
        expected = (states @ weight / len(states)).numpy()
    is_image = inputs["mm_token_type_ids"][0].bool().numpy()
    explanation = explain(classifier, example)
    found = np.concatenate([grid.ravel() for grid in explanation.patches])
    np.testing.assert_allclose(found, expected[is_image], rtol=2e-3, atol=2e-6)
    merge = backbone.processor.merge_size
    assert [grid.shape for grid in explanation.patches] == [
        (height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()
    ]
    start, end = backbone.processor.text_span(inputs["input_ids"][0].tolist())
    words = [value for _, value in explanation.words]
    assert sum(words) == pytest.approx(expected[start:end].sum(), rel=2e-3, abs=1e-5)
    assert explanation.words[0] == ("There", pytest.approx(expected[start], rel=2e-3, abs=2e-6))
    outside = expected.sum() - expected[is_image].sum() - expected[start:end].sum()
    assert explanation.template == pytest.approx(outside, rel=2e-3, abs=1e-5)


def test_an_mlp_head_is_taken_apart_to_first_order(tiny_classifier, wide_picture):
    explanation = explain(tiny_classifier, Example(wide_picture, TEXT))
    assert not explanation.exact
    feature = torch.from_numpy(tiny_classifier.backbone.encode([Example(wide_picture, TEXT)], [tiny_classifier.tap])[0])

    head = copy.deepcopy(tiny_classifier.head).double()

    @torch.no_grad()
    def log_odds(scale: float) -> float:
        negative, positive = head(feature.double() * scale)[0].tolist()
        return positive - negative

    slope = (log_odds(1 + 1e-6) - log_odds(1 - 1e-6)) / 2e-6
    assert total(explanation) == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("tap", [Tap(-1, "last"), Tap(3, "text")], ids=str)
def test_gradient_x_input_is_the_slope_in_the_size_of_the_embeddings(tiny_backbone, wide_picture, tap):
    classifier = make_classifier(tiny_backbone, tap)
    difference = (classifier.head.weight[1] - classifier.head.weight[0]).detach().double().numpy()
    example = Example(wide_picture, TEXT)
    explanation = explain(classifier, example)
    assert explanation.method == GRADIENT_INPUT
    assert not explanation.exact
    is_image = tiny_backbone.processor([example])["mm_token_type_ids"][0].bool()

    def log_odds(scale: torch.Tensor) -> float:
        """Return the log odds, but for the bias, with each token's embedding scaled."""
        first = tiny_backbone.model.language_model.layers[0]
        hook = first.register_forward_pre_hook(lambda _, args: (args[0] * scale[:, None], *args[1:]))
        try:
            return float(tiny_backbone.encode([example], [tap])[0, 0] @ difference)
        finally:
            hook.remove()

    def slope(moved: torch.Tensor) -> float:
        return (log_odds(1 + 0.01 * moved) - log_odds(1 - 0.01 * moved)) / 0.02

    assert total(explanation) == pytest.approx(slope(torch.ones(len(is_image))), rel=0.05, abs=1e-3)
    pictures = float(explanation.patches[0].sum())
    assert pictures == pytest.approx(slope(is_image.float()), rel=0.05, abs=1e-3)
    assert abs(pictures) > 5e-3


def test_what_enters_between_layers_counts():
    layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(3)]
    start, injected = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    with _recorded_entries(layers) as entries:
        hidden = layers[1](layers[0](start)) + injected
        output = layers[2](hidden).sum()
    assert len(entries) == 2
    gradients = torch.autograd.grad(output, [stream for stream, _ in entries])
    parts = [float((gradient * part).sum()) for gradient, (_, part) in zip(gradients, entries, strict=True)]
    assert parts[1] == pytest.approx(layers[2](injected).sum().item(), abs=1e-6)
    assert sum(parts) == pytest.approx(output.item(), abs=1e-6)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)


def test_picture_features_of_qwen3_enter_its_later_layers(nano_checkpoint, wide_picture):
    family, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    with _recorded_entries(backbone.model.language_model.layers) as entries:
        backbone.encode_batch(backbone.processor([Example(wide_picture, TEXT)]), [Tap(-1, "last")])
    assert len(entries) == (3 if family == "qwen3_vl" else 1)


def test_an_average_over_the_picture_does_not_hear_the_text(tiny_backbone, wide_picture):
    explanation = explain(make_classifier(tiny_backbone, Tap(2, "image")), Example(wide_picture, TEXT))
    assert {value for _, value in explanation.words} == {0.0}
    assert explanation.template == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("tap", TAPS, ids=str)
def test_text_alone_has_no_patches(tiny_backbone, tap):
    explanation = explain(make_classifier(tiny_backbone, tap), Example(None, TEXT))
    assert explanation.patches == []
    assert len(explanation.words) == 8


def test_an_empty_text_has_no_words(tiny_classifier, wide_picture):
    explanation = explain(tiny_classifier, Example(wide_picture, ""))
    assert explanation.words == []
    assert explanation.patches[0].shape == (3, 5)


def test_a_caller_in_inference_mode_gets_the_same(tiny_backbone, wide_picture):
    for tap in (Tap(-1, "mean"), Tap(-1, "last")):
        classifier = make_classifier(tiny_backbone, tap, "mlp")
        with torch.inference_mode():
            inside = explain(classifier, Example(wide_picture, TEXT))
        assert inside.to_json() == explain(classifier, Example(wide_picture, TEXT)).to_json()


def test_explaining_leaves_the_model_as_it_was(tiny_backbone, wide_picture):
    classifier = make_classifier(tiny_backbone, Tap(-1, "last"))
    before = classifier.predict_proba([Example(wide_picture, TEXT)])
    explain(classifier, Example(wide_picture, TEXT))
    assert all(parameter.grad is None for parameter in tiny_backbone.model.parameters())
    assert all(parameter.grad is None for parameter in classifier.head.parameters())
    assert not any(module._forward_pre_hooks for module in tiny_backbone.model.modules())
    np.testing.assert_array_equal(classifier.predict_proba([Example(wide_picture, TEXT)]), before)


def test_zero_shot_is_explained_too(tiny_backbone, wide_picture):
    explanation = explain(Classifier.zero_shot(tiny_backbone), Example(wide_picture, TEXT))
    assert explanation.method == GRADIENT_INPUT
    assert np.abs(explanation.patches[0]).max() > 0


def test_a_broken_picture_is_an_image_error(tiny_classifier):
    with pytest.raises(ImageError):
        explain(tiny_classifier, Example(b"no picture", TEXT))
    with pytest.raises(ImageError):
        heat_map(b"no picture", np.ones((2, 2)))


def test_an_explanation_survives_json(tiny_classifier, wide_picture):
    explanation = explain(tiny_classifier, Example(wide_picture, "Мир\x1b [31m ok"))
    content = json.loads(json.dumps(explanation.to_json(), allow_nan=False))
    assert content == explanation.to_json()
    np.testing.assert_array_equal(content["patches"][0], explanation.patches[0])
    assert [(entry["word"], entry["contribution"]) for entry in content["words"]] == explanation.words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is the cafe\u0301 red?", ["Is", "the", "cafe\u0301", "red", "?"]),
        ("  don't\n2024-05 (x)  ", ["don't", "2024", "-", "05", "(", "x", ")"]),
        ("Это красный круг.", ["Это", "красный", "круг", "."]),
        ("यह लाल है", ["यह", "लाल", "है"]),
        ("图片 blue", ["图", "片", "blue"]),
        ("빨간 원", ["빨간", "원"]),
        ("<|image_pad|>", ["<|", "image", "_", "pad", "|>"]),
        ("", []),
    ],
)
def test_tokens_are_joined_to_words(tiny_backbone, text, words):
    tokens = tiny_backbone.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    if "<" in text:  # Qwen's processor splits it up, as `explain` does
        offsets = [(index, index + 1) for index in range(len(text))]
    joined = join_words(text, offsets, [1.0] * len(offsets))
    assert [word for word, _ in joined] == words
    assert sum(value for _, value in joined) == len(offsets)


def test_words_that_share_a_token_are_one():
    offsets = [(0, 1), (1, 5), (5, 7), (7, 9), (9, 10), (10, 13)]  # a| (b)| c|-d| |e。f
    joined = join_words("a (b) c-d e。f", offsets, [1, 2, 4, 8, 16, 32])
    assert joined == [("a", 1), ("(b)", 2), ("c", 4), ("-d", 8), ("e。f", 48)]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_character_and_no_contribution_is_lost(text):
    cuts = [*range(0, len(text), 3), len(text)]
    offsets = list(itertools.pairwise(cuts))
    joined = join_words(text, offsets, [1.0] * len(offsets))
    assert sum(value for _, value in joined) == len(offsets)
    assert "".join("".join(word.split()) for word, _ in joined) == "".join(text.split())


def test_a_heat_map_colours_squares_where_they_are():
    shaded = np.asarray(heat_map(Image.new("RGB", (64, 32), "white"), np.array([[1.0, 0, 0, 0], [0, 0, 0, -0.5]])))
    assert shaded.shape == (384 + 60, 768, 3)
    red, _, blue = shaded[96, 96].astype(int)
    assert red > blue + 100, "class 1 is orange"
    red, _, blue = shaded[288, 672].astype(int)
    assert blue > red + 50, "class 0 is blue"
    assert shaded[96, 672].tolist() == shaded[288, 96].tolist() == [255, 255, 255]
    assert len(np.unique(shaded[384:].reshape(-1, 3), axis=0)) > 50, "the scale is there"


def test_a_heat_map_of_nothing_is_the_grey_picture():
    shaded = np.asarray(heat_map(Image.new("RGB", (30, 30), (200, 30, 30)), np.zeros((2, 3))))
    assert len(np.unique(shaded[:768].reshape(-1, 3), axis=0)) == 1
    assert len(set(shaded[0, 0].tolist())) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (3000, 2000)])
def test_heat_maps_of_any_shape_keep_room_for_the_scale(size):
    width, height = heat_map(Image.new("RGB", size), np.eye(2)).size
    assert 320 <= width <= 768
    assert 61 <= height <= 828
