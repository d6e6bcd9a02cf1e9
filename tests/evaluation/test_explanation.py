"""Explanations: contributions against transformers' own forward pass, and what they must add up to."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import adapter_weights
from qwen_vl_classifier.errors import ConfigError, ExplanationError, ImageError
from qwen_vl_classifier.evaluation.explanation import METHODS, Explanation, PlannedExplanation, explain
from tests.evaluation.explained import TAPS, TEXT, log_odds_of, make_classifier, total

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = [(method, tap) for method in METHODS for tap in TAPS if method != "tokens" or tap.pooling in ("mean", "image")]


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("method", "tap"), WAYS, ids=str)
def test_the_probability_is_that_of_the_classifier(tiny_backbone, mixed_examples, kind, method, tap):
    classifier = make_classifier(tiny_backbone, tap, kind, temperature=0.7)
    for example in mixed_examples[1:3] if kind == "linear" else mixed_examples[3:5]:
        explanation = explain(classifier, example, method=method)
        assert explanation.probability == pytest.approx(classifier.predict_proba([example])[0, 1], abs=1e-6)
        log_odds = np.log(explanation.probability / (1 - explanation.probability))
        assert explanation.log_odds == pytest.approx(log_odds, abs=1e-5)
        assert total(explanation) + explanation.rest == pytest.approx(log_odds, abs=1e-5)
        assert len(explanation.patches) == len(example.images)
        assert "".join(word for word, _ in explanation.words) == "".join(example.text.split())


def test_contributions_are_in_log_odds_before_an_isotonic_curve(tiny_backbone, wide_picture):
    classifier = make_classifier(tiny_backbone, Tap(-1, "mean"))
    example = Example(wide_picture, TEXT)
    plain = explain(classifier, example)
    classifier.isotonic = ((0.0, 1.0), (0.2, 0.4))
    curved = explain(classifier, example)
    assert curved.probability == pytest.approx(0.2 + 0.2 * plain.probability)
    assert curved.log_odds == plain.log_odds
    assert "before an isotonic curve" in curved.to_json()["unit"]


@pytest.mark.parametrize("tap", [Tap(-1, "mean"), Tap(2, "mean"), Tap(-1, "image")], ids=str)
def test_contributions_of_a_linear_head_add_up_to_the_logits_without_bias(tiny_backbone, wide_picture, tap):
    classifier = make_classifier(tiny_backbone, tap, temperature=2.0)
    explanation = explain(classifier, Example(wide_picture, TEXT), method="tokens")
    bias = classifier.head.bias[1] - classifier.head.bias[0]
    assert explanation.exact
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
    explanation = explain(classifier, example, method="tokens")
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
    explanation = explain(tiny_classifier, Example(wide_picture, TEXT), method="tokens")
    assert not explanation.exact
    feature = torch.from_numpy(tiny_classifier.backbone.encode([Example(wide_picture, TEXT)], [tiny_classifier.tap])[0])

    head = copy.deepcopy(tiny_classifier.head).double()

    @torch.no_grad()
    def log_odds(scale: float) -> float:
        negative, positive = head(feature.double() * scale)[0].tolist()
        return positive - negative

    slope = (log_odds(1 + 1e-6) - log_odds(1 - 1e-6)) / 2e-6
    assert total(explanation) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_a_covered_square_is_a_picture_without_it(tiny_backbone, wide_picture):
    """A picture of one colour with a square of others on it: covering it leaves the plain picture."""
    plain = Image.new("RGB", (140, 84), (200, 120, 40))
    changed = plain.copy()
    changed.paste(wide_picture.crop((0, 0, 28, 28)), (56, 28))
    for tap in TAPS:
        classifier = make_classifier(tiny_backbone, tap)
        explanation = explain(classifier, Example(changed, TEXT), method="occlusion")
        (grid,) = explanation.patches
        expected = log_odds_of(classifier, Example(changed, TEXT)) - log_odds_of(classifier, Example(plain, TEXT))
        assert grid[1, 2] == pytest.approx(expected, abs=1e-4)
        grid[1, 2] = 0
        np.testing.assert_allclose(grid, 0, atol=1e-4)


def test_a_word_left_out_is_a_text_without_it(tiny_backbone, wide_picture):
    classifier = make_classifier(tiny_backbone, Tap(-1, "mean"), temperature=2.0)
    words = explain(classifier, Example(wide_picture, TEXT), method="occlusion").words
    whole = log_odds_of(classifier, Example(wide_picture, TEXT))
    shorter = log_odds_of(classifier, Example(wide_picture, TEXT.replace(" two", "")))
    assert dict(words)["two"] == pytest.approx(whole - shorter, abs=1e-4)


def test_large_pictures_are_covered_in_larger_squares(tiny_backbone):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28 * 5, 28 * 31, 3), dtype=np.uint8))
    (grid,) = explain(make_classifier(tiny_backbone, Tap(1, "mean")), Example(picture, "x"), method="occlusion").patches
    assert grid.shape == (5, 31)
    np.testing.assert_array_equal(grid[0:2, 0:2], grid[0, 0])
    assert len(np.unique(grid)) == 3 * 16


def test_the_tap_must_average_over_the_picture_for_tokens(tiny_backbone, wide_picture):
    for tap in (Tap(-1, "last"), Tap(3, "text")):
        with pytest.raises(ConfigError, match="gradients or occlusion"):
            explain(make_classifier(tiny_backbone, tap), Example(wide_picture, TEXT), method="tokens")
    with pytest.raises(ConfigError, match="magic"):
        explain(make_classifier(tiny_backbone, Tap(-1, "last")), Example(wide_picture, TEXT), method="magic")


def test_shares_of_image_tokens_do_not_hear_the_question_and_gradients_do(tiny_backbone, wide_picture):
    classifier = make_classifier(tiny_backbone, Tap(-1, "mean"))
    asked = ("There is a red circle.", "Is there a blue star?")
    for method, same in (("tokens", True), ("gradients", False), ("occlusion", False)):
        one, other = (explain(classifier, Example(wide_picture, text), method=method).patches[0] for text in asked)
        one, other = one / np.abs(one).max(), other / np.abs(other).max()  # averages are over numbers of tokens
        assert np.allclose(one, other, atol=1e-4) == same


@pytest.mark.parametrize(
    ("nano_checkpoint", "method"),
    [*((family, "gradients") for family in ("qwen2_5_vl", "qwen3_vl_moe", "qwen3_5")), ("qwen2_5_vl", "occlusion")],
    indirect=["nano_checkpoint"],
)
def test_an_adapter_is_explained_with_the_rest(nano_checkpoint, wide_picture, method):
    pytest.importorskip("peft")
    _, folder = nano_checkpoint
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    example = Example(wide_picture, TEXT)
    classifier = make_classifier(backbone, Tap(-1, "last"))
    before = explain(classifier, example, method=method)
    add_adapter(backbone, towers="llm+vision", tap=classifier.tap, rank=4, alpha=8)
    unchanged = explain(classifier, example, method=method)
    np.testing.assert_allclose(unchanged.patches[0], before.patches[0], atol=1e-5)
    weights = adapter_weights(backbone.model, backbone.adapter)
    with torch.no_grad():
        for weight in weights.values():
            weight += torch.randn_like(weight) * 0.1
    backbone.mark_changed()
    changed = explain(classifier, example, method=method)
    assert changed.log_odds == pytest.approx(log_odds_of(classifier, example), abs=1e-5)
    assert np.abs(changed.patches[0] - before.patches[0]).max() > 1e-3
    assert all(weight.requires_grad and weight.grad is None for weight in weights.values())


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
    assert explain(tiny_classifier, Example(None, "")).words == []


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
    assert explanation.method == "gradients"
    assert np.abs(explanation.patches[0]).max() > 0


def test_a_broken_picture_is_an_image_error(tiny_classifier):
    with pytest.raises(ImageError):
        explain(tiny_classifier, Example(b"no picture", TEXT))


def test_an_explanation_survives_json(tiny_classifier, wide_picture):
    explanation = explain(tiny_classifier, Example(wide_picture, "Мир\x1b [31m ok"))
    content = json.loads(json.dumps(explanation.to_json(), allow_nan=False))
    assert content == explanation.to_json()
    np.testing.assert_array_equal(content["patches"][0], explanation.patches[0])
    assert [(entry["word"], entry["contribution"]) for entry in content["words"]] == explanation.words


@pytest.mark.parametrize(("rest", "warned"), [(19.0, True), (-19.0, True), (0.5, False)])
@pytest.mark.parametrize(
    ("baseline", "named"), [("average", "the average training picture"), ("empty", "an empty picture of one colour")]
)
def test_the_start_is_told_and_a_start_that_outweighs_the_answer_is_warned_of(rest, warned, baseline, named):
    patches, words = [np.full((2, 2), (-1.0 - rest) / 4)], [("red", 0.5)]
    given = (0.4, -0.5, patches, words, 0.0, rest)
    lines = Explanation(*given, "gradients", False, baseline).summary()
    assert lines[0] == f"squares explain the difference from {named}"
    assert lines[1].startswith(f"{named} without words: {rest:+.3g} log odds")
    assert f"the picture adds {-1 - rest:+.3g}" in lines[1]
    assert any("outweighs the answer" in line for line in lines) == warned
    assert Explanation(*given, "occlusion", False, baseline).summary() == lines[:1]


def test_text_alone_and_tokens_are_compared_with_no_picture(tiny_backbone, wide_picture, average):
    classifier = make_classifier(tiny_backbone, Tap(-1, "mean"), average=average)
    alone = explain(classifier, Example(None, TEXT))
    assert alone.baseline is None
    assert alone.summary()[0].startswith("without words:")
    assert explain(classifier, Example(None, TEXT), method="occlusion").summary() == []
    tokens = explain(classifier, Example(wide_picture, TEXT), method="tokens")
    assert tokens.to_json()["baseline"] is None
    assert tokens.summary()[0].startswith("before any token is counted")


def test_a_covered_square_is_that_of_the_average_picture(tiny_backbone, wide_picture):
    usual = Image.new("RGB", (4, 4), (90, 120, 40))
    plain = usual.resize((140, 84))
    changed = plain.copy()
    changed.paste(wide_picture.crop((0, 0, 28, 28)), (56, 28))
    classifier = make_classifier(tiny_backbone, Tap(-1, "last"), average=usual)
    (grid,) = explain(classifier, Example(changed, TEXT), method="occlusion").patches
    expected = log_odds_of(classifier, Example(changed, TEXT)) - log_odds_of(classifier, Example(plain, TEXT))
    assert grid[1, 2] == pytest.approx(expected, abs=1e-4)
    grid[1, 2] = 0
    np.testing.assert_allclose(grid, 0, atol=1e-4)


@pytest.mark.parametrize("method", ["gradients", "occlusion"])
def test_the_average_picture_itself_differs_from_it_in_no_square(tiny_backbone, average, method):
    classifier = make_classifier(tiny_backbone, Tap(-1, "last"), average=average)
    example = Example(average.resize((112, 112), Image.Resampling.BICUBIC), TEXT)
    np.testing.assert_allclose(explain(classifier, example, method=method).patches[0], 0, atol=1e-4)
    assert np.abs(explain(classifier, example, method=method, baseline="empty").patches[0]).max() > 1e-3


def test_the_average_is_the_usual_baseline_where_there_is_one(tiny_backbone, wide_picture, average):
    example = Example(wide_picture, TEXT)
    classifier = make_classifier(tiny_backbone, Tap(-1, "last"))
    empty = explain(classifier, example)
    assert empty.baseline == "empty"
    classifier.average = average
    usual, asked, other = (explain(classifier, example, baseline=one) for one in (None, "average", "empty"))
    assert usual.to_json() == asked.to_json()
    assert (usual.baseline, other.to_json()) == ("average", empty.to_json())
    assert usual.probability == empty.probability
    assert np.abs(usual.patches[0] - empty.patches[0]).max() > 1e-3


def test_a_baseline_that_cannot_be_had_is_an_error(tiny_backbone, wide_picture, average):
    classifier = make_classifier(tiny_backbone, Tap(-1, "mean"))
    example = Example(wide_picture, TEXT)
    with pytest.raises(ConfigError, match=r"baseline average: .* 20 distinct training pictures .* baseline empty"):
        explain(classifier, example, baseline="average")
    with pytest.raises(ConfigError, match=r"'grey'.*average, empty"):
        explain(classifier, example, baseline="grey")
    with pytest.raises(ConfigError, match="method tokens, which uses no baseline"):
        explain(classifier, example, method="tokens", baseline="empty")


@pytest.mark.parametrize("method", ["gradients", "tokens", "occlusion"])
def test_its_passes_are_known_before_the_first_and_others_may_come_between(tiny_classifier, wide_picture, method):
    example = Example(wide_picture, TEXT)
    (encoded,) = tiny_classifier.backbone.prepare([example])
    tokens = len(encoded.ids)
    expected = explain(tiny_classifier, example, method=method)
    (before,) = tiny_classifier.predict_proba([example])
    planned = PlannedExplanation(tiny_classifier, example, method=method, max_shared_tokens=3 * tokens)
    found = None
    for number in range(len(planned.costs)):
        assert found is None, f"{number} of {len(planned.costs)} passes"
        found = planned.run_pass()
        assert not torch.is_inference_mode_enabled()
        (after,) = tiny_classifier.predict_proba([example])
        np.testing.assert_array_equal(before, after)
    assert found is not None
    assert max(planned.costs) <= 3 * tokens
    assert sum(planned.costs) == {"gradients": 51, "tokens": 1}.get(method, sum(planned.costs) / tokens) * tokens
    for grid, right in zip(found.patches, expected.patches, strict=True):
        np.testing.assert_allclose(grid, right, atol=1e-4)
    for (word, value), (_, right) in zip(found.words, expected.words, strict=True):
        assert value == pytest.approx(right, abs=1e-4), word


@pytest.mark.parametrize(("method", "counted"), [("gradients", 3), ("tokens", 1), ("occlusion", 1)])
def test_an_example_that_costs_more_than_a_pass_may_is_refused(tiny_classifier, wide_picture, method, counted):
    (encoded,) = tiny_classifier.backbone.prepare([Example(wide_picture, TEXT)])
    most = counted * len(encoded.ids)
    PlannedExplanation(tiny_classifier, Example(wide_picture, TEXT), method=method, max_tokens=most)
    with pytest.raises(ExplanationError, match=f"text and pictures make {len(encoded.ids)} tokens.*at most {most - 1}"):
        PlannedExplanation(tiny_classifier, Example(wide_picture, TEXT), method=method, max_tokens=most - 1)
