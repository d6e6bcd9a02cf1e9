"""Features of any mix of examples are those that transformers computes for one example at a time.

Only the public way in is used: `Backbone.load`, `encode`, `encode_batch`. Each test has a long variant, `make soak`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN
from qwen_vl_classifier.backbone.layers import linear_attention
from qwen_vl_classifier.backbone.taps import POOLINGS
from qwen_vl_classifier.scenes.statements import vocabulary
from tests import nano
from tests.nano import NUM_LAYERS
from tests.reference import (
    assert_close,
    by_hand,
    by_hand_where_routing_is_clear,
    cosine_distance,
    load_reference,
    tolerance_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PART = 2  # layers, where not all are loaded
NORMED = [Tap(layer, pooling, normed=True) for layer in (1, PART) for pooling in ("mean", "last")]
TAPS = {
    PART: [Tap(layer, pooling) for layer in (1, PART) for pooling in POOLINGS] + NORMED,
    None: [Tap(layer, pooling) for layer in (1, PART, NUM_LAYERS, -1) for pooling in POOLINGS] + NORMED,
}
COSINE_DISTANCE = 5e-4  # most, in bfloat16

SPECIAL = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "\n")
WORDS = vocabulary()  # each is one token

SIZES = st.one_of(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 3), st.integers(60, 600)),  # one row, or one column, of tokens
    st.tuples(st.integers(60, 600), st.integers(1, 3)),
    st.sampled_from([(28, 28), (56, 56), (112, 112), (448, 448), (300, 420)]),
).filter(lambda size: max(size) <= 200 * min(size))

TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=4)), max_size=6).map("".join),
    st.tuples(st.integers(1, 400), st.integers(1, 9)).map(lambda drawn: words(*drawn)),
)


def words(count: int, step: int) -> str:
    """Write a text of so many tokens."""
    return " ".join(WORDS[number * step % len(WORDS)] for number in range(count))


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    """Draw a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@st.composite
def mixes(draw: st.DrawFn, most: int = 6) -> list[Example]:
    """Draw examples about none to three of a few pictures, which they share, as one object or as equal pixels."""
    pictures = [noise(seed, size) for seed, size in enumerate(draw(st.lists(SIZES, min_size=1, max_size=3)))]
    pictures.append(pictures[0].copy())
    chosen = st.lists(st.sampled_from(pictures), max_size=3)
    rows = draw(st.lists(st.tuples(chosen, TEXTS), min_size=1, max_size=most))
    return [Example(images or None, text) for images, text in rows]


WAYS = st.fixed_dictionaries({"token_budget": st.none() | st.integers(1, 1500), "share_prefixes": st.booleans()})
DEPTHS = st.sampled_from([None, PART])
KERNELS = st.sampled_from([nullcontext, lambda: sdpa_kernel(SDPBackend.MATH)])
"""torch's choice of attention kernel, or the one that computes by the definition."""


def taps_at(depth: int | None) -> st.SearchStrategy[list[Tap]]:
    return st.just(TAPS[depth]) | st.lists(st.sampled_from(TAPS[depth]), min_size=1, unique=True)


def examples_each(short: int, long: int) -> pytest.MarkDecorator:
    """Run a test with so many random mixes, or with many more under soak."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.soak)])


def holds(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let hypothesis try a property on the same `count` mixes in every run."""
    return settings(max_examples=count, derandomize=True, suppress_health_check=list(HealthCheck))


@examples_each(7, 400)
def test_encode_equals_transformers(nano_checkpoint, nano_backbone, reference_model, count):
    compared: list[bool] = []

    @holds(count)
    @given(mix=mixes(), way=WAYS, depth=DEPTHS, kernel=KERNELS, data=st.data())
    def check(mix, way, depth, kernel, data):
        backbone = nano_backbone(torch.float32, depth)
        taps = data.draw(taps_at(depth))
        model = reference_model(torch.float32)
        wanted, clear = by_hand_where_routing_is_clear(model, backbone.processor, mix, taps)
        compared.extend(clear)
        with kernel():
            seen = backbone.encode(mix, taps, **way)
            again = backbone.encode(mix, taps, **way)
        assert seen.dtype == np.float32
        assert_close(seen[clear], wanted[clear], tolerance=tolerance_of(nano_checkpoint[0]))
        np.testing.assert_array_equal(again, seen)

    check()
    assert np.mean(compared) > 0.5


@examples_each(3, 150)
def test_encode_batch_equals_transformers(nano_checkpoint, nano_backbone, reference_model, count):
    @holds(count)
    @given(mix=mixes(most=4), left=st.booleans(), depth=DEPTHS, kernel=KERNELS)
    def check(mix, left, depth, kernel):
        backbone = nano_backbone(torch.float32, depth)
        inputs = backbone.processor(mix)
        if left:
            inputs = padded_on_the_left(inputs)
        with kernel():
            seen = backbone.encode_batch(inputs, TAPS[depth])
        model = reference_model(torch.float32)
        wanted, clear = by_hand_where_routing_is_clear(model, backbone.processor, mix, TAPS[depth])
        assert_close(seen.numpy()[clear], wanted[clear], tolerance=tolerance_of(nano_checkpoint[0]))

    check()


def padded_on_the_left(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = inputs["input_ids"].shape[1]
    counts = inputs["attention_mask"].sum(dim=1).tolist()
    return inputs | {
        name: torch.stack([row.roll(length - count) for row, count in zip(inputs[name], counts, strict=True)])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }


@examples_each(3, 150)
def test_bfloat16_is_as_near_as_rounding_allows(nano_checkpoint, nano_backbone, reference_model, count):
    """Hold features in bfloat16 to transformers' own, whose distance from float32 says what rounding alone does.

    The random weights are noisy: where a single token is read, transformers itself is up to 1.4e-3 away from float32.
    With experts only the average holds, and roughly: where two experts are nearly tied for a token, rounding decides
    which one it is sent to, and does so anew in every computation.
    """
    ours, theirs = [], []

    @holds(count)
    @given(mix=mixes(), way=WAYS, kernel=KERNELS)
    def check(mix, way, kernel):
        backbone, taps = nano_backbone(torch.bfloat16), TAPS[None]
        exact, wanted = (
            by_hand(reference_model(dtype), backbone.processor, mix, taps) for dtype in (torch.float32, torch.bfloat16)
        )
        with kernel():
            seen = backbone.encode(mix, taps, **way)
        rounding = cosine_distance(wanted, exact)
        if nano_checkpoint[0] not in nano.EXPERTS:
            assert_as_near(cosine_distance(seen, wanted), rounding=rounding)
        ours.append(cosine_distance(seen, exact).mean())
        theirs.append(rounding.mean())

    check()
    slack = 3 if nano_checkpoint[0] in nano.EXPERTS else 1.5
    assert np.log(ours).mean() <= np.log(theirs).mean() + np.log(slack)


def assert_as_near(distance: np.ndarray, *, rounding: np.ndarray) -> None:
    """Hold cosine distances to `COSINE_DISTANCE`, or to four times what rounding does at the same tap if that is more.

    Two computations that round independently are twice as far from each other as each is from the exact one, on
    average; single tokens scatter about that.
    """
    assert (distance <= np.maximum(COSINE_DISTANCE, 4 * rounding.max(axis=0))).all()


@examples_each(3, 150)
def test_bfloat16_with_trained_weights(count):
    folder = BUILTIN["builtin:tiny"]
    backbone = Backbone.load(folder, device="cpu", dtype="bfloat16")
    model = load_reference(backbone.family.model_type, folder, torch.bfloat16)
    taps = [Tap(layer, pooling) for layer in (1, backbone.num_layers, -1) for pooling in POOLINGS]

    @holds(count)
    @given(mix=mixes(), way=WAYS)
    def check(mix, way):
        wanted = by_hand(model, backbone.processor, mix, taps)
        assert (cosine_distance(backbone.encode(mix, taps, **way), wanted) <= COSINE_DISTANCE).all()

    check()


@examples_each(3, 150)
def test_neighbours_do_not_matter(nano_checkpoint, nano_backbone, count):
    @holds(count)
    @given(mix=mixes(), way=WAYS)
    def check(mix, way):
        taps = TAPS[None]
        alone, together = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            backbone = nano_backbone(dtype)
            alone[dtype] = np.concatenate([backbone.encode([example], taps) for example in mix])
            together[dtype] = backbone.encode(mix, taps, **way)
        assert_close(together[torch.float32], alone[torch.float32], tolerance=tolerance_of(nano_checkpoint[0]))
        assert_as_near(
            cosine_distance(together[torch.bfloat16], alone[torch.bfloat16]),
            rounding=cosine_distance(alone[torch.bfloat16], alone[torch.float32]),
        )

    check()


@examples_each(6, 150)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_example_given_twice_has_the_same_features_twice(nano_backbone, dtype, count):
    @holds(count)
    @given(mix=mixes(most=4), way=WAYS)
    def check(mix, way):
        features = nano_backbone(dtype).encode(mix + mix, TAPS[None], **way)
        np.testing.assert_array_equal(features[: len(mix)], features[len(mix) :])

    check()


ARRANGEMENTS = [
    ("qwen3_vl_moe", {"mlp_only_layers": [1]}),
    ("qwen3_vl_moe", {"decoder_sparse_step": 2}),
    ("qwen3_5", {"layer_types": ["full_attention", "linear_attention"] * 2}),
    ("qwen3_5", {"layer_types": ["full_attention", *["linear_attention"] * 3]}),
    ("qwen3_5", {"layer_types": None, "full_attention_interval": 2}),
    ("qwen3_5", {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 2}),
    ("qwen3_5_moe", {"num_experts_per_tok": 8}),
    ("qwen3_5_moe", {"num_experts_per_tok": 1, "layer_types": ["full_attention"] * 4}),
]


@pytest.mark.parametrize(("family", "text_config"), ARRANGEMENTS)
def test_other_arrangements_of_layers(family, text_config, tmp_path):
    folder = nano.make_checkpoint(family, tmp_path / family, text_config=text_config)
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    mix = [Example(noise(0, (90, 90)), words(8, 1)), Example(noise(0, (90, 90)), words(20, 3)), Example(None, "x")]
    wanted = by_hand(load_reference(family, folder), backbone.processor, mix, TAPS[None])
    for share_prefixes in (True, False):
        seen = backbone.encode(mix, TAPS[None], share_prefixes=share_prefixes)
        assert_close(seen, wanted, tolerance=tolerance_of(family))


@pytest.mark.parametrize("family", nano.HYBRID)
@pytest.mark.parametrize("lost", ["state", "convolution"])
def test_a_suffix_that_starts_from_nothing_would_show(family, lost, tmp_path, monkeypatch):
    """What a prefix leaves behind lasts in these random checkpoints, so the tests above can fail."""
    backbone = Backbone.load(nano.make_checkpoint(family, tmp_path / family), device="cpu", dtype="float32")
    examples = [Example(noise(0, (90, 90)), words(8, step)) for step in (1, 2)]
    sound = backbone.encode(examples, TAPS[None])
    rule = linear_attention.gated_delta_rule

    def without_state(*args, states=None, **options):
        return rule(*args, states=None if states is None else torch.zeros_like(states), **options)

    def without_past(convolve):
        def run(columns, weight, *args, **options):
            columns = columns.clone()
            columns[..., : weight.shape[-1] - 1] = 0
            return convolve(columns, weight, *args, **options)

        return run

    if lost == "state":
        monkeypatch.setattr(linear_attention, "gated_delta_rule", without_state)
    else:
        for name in ("conv1d", "conv2d"):  # whichever is used, the columns of the past come first
            monkeypatch.setattr(torch.nn.functional, name, without_past(getattr(torch.nn.functional, name)))
    broken = backbone.encode(examples, TAPS[None])
    distance = np.abs(broken - sound).max(axis=-1) / np.maximum(np.abs(sound).max(axis=-1), 1e-30)
    of_text = [TAPS[None].index(Tap(layer, "text")) for layer in (PART, NUM_LAYERS)]
    assert distance[:, of_text].min() > 0.05
