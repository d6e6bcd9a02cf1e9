"""Prompts whose text comes before the pictures: the same tokens, spans and features as everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap, explain
from qwen_vl_classifier.backbone.planning import plan
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.classifier.probabilities import margins_of
from tests import nano
from tests.reference import assert_close, by_hand, load_reference

RED, WIDE = Image.new("RGB", (64, 64), "red"), Image.linear_gradient("L").resize((128, 64)).convert("RGB")
TEMPLATE = """<|im_start|>user
Query:{{ messages[0].content[-1].text }}
Document:{% for part in messages[0].content[:-1] %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}<|im_end|>
<|im_start|>assistant
"""
TEXTS = ("a red square.", "", '("quoted")', "ends in a newline\n", "42", "<|image_pad|>", " blanks ")
TAPS = [Tap(layer, pooling) for layer in (1, -1) for pooling in ("mean", "text", "image", "last")]
ROWS = [Example(images, text) for text in TEXTS for images in (RED, (WIDE, RED))] + [Example(None, "a text alone.")]


JOINED = ((".", "Ċ"), (":", '"'), (":", "("), ('"', "Ċ"))
"""Pairs that one token stands for, as in Qwen's vocabulary; Ċ is a newline there. The tiny vocabulary lacks them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = nano.make_checkpoint("qwen3_vl", tmp_path_factory.mktemp("prompt") / "nano")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for pair in JOINED:  # in place of the latest merges, of which no other is made
        vocabulary["".join(pair)] = vocabulary.pop("".join(merges.pop()))
    merges += [list(pair) for pair in JOINED]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def backbone(folder) -> Backbone:
    return Backbone.load(folder, device="cpu", dtype="float32", chat_template=TEMPLATE)


def whole(processor: Processor, example: Example) -> list[int]:
    """Tokenise the whole prompt in one go."""
    pictures = "".join(
        f"<|vision_start|>{'<|image_pad|>' * (height * width // 4)}<|vision_end|>"
        for _, height, width in processor.read_pictures(example).grids
    )
    text = f"<|im_start|>user\nQuery:{example.text}\nDocument:{pictures}<|im_end|>\n<|im_start|>assistant"
    return processor.tokenizer(text)["input_ids"]


@settings(max_examples=60)
@given(text=st.text(alphabet=' \n\t.,:;"(é是a1<', max_size=8), picture=st.booleans())
def test_the_tokens_are_those_of_the_whole_prompt(backbone, text, picture):
    example = Example(RED if picture else None, text)
    assert backbone.processor.encode(example).ids == whole(backbone.processor, example)


@settings(max_examples=60)
@given(text=st.text(alphabet=' \n\t.,:;"(é是a1<', max_size=8), picture=st.booleans())
def test_the_tokens_of_the_text_stand_for_the_text(backbone, text, picture):
    processor, example = backbone.processor, Example(RED if picture else None, text)
    encoded = processor.encode(example)
    start, end = encoded.spans.text
    assert text in processor.tokenizer.decode(encoded.ids[start:end]).replace("\ufffd", "") or not text.isascii()
    assert end - start <= len(processor.tokenizer(text)["input_ids"]) + 3
    offsets = processor.text_offsets(example)
    assert len(offsets) == end - start
    assert all(0 <= first <= last <= len(text) for first, last in offsets)
    assert set(range(len(text))) == {place for offset in offsets for place in range(*offset)}
    assert processor.text_span(encoded.ids) == (start, end)


@pytest.mark.parametrize("text", ["a.", '"a', "(a"])
def test_words_of_the_template_and_the_text_may_be_one_token(backbone, text):
    """Tokenised apart they would be two: the other tests see whether they are joined."""
    processor = backbone.processor
    apart = [token for part in ("Query:", text, "\nDocument:") for token in processor.tokenizer(part)["input_ids"]]
    assert len(apart) == len(processor.tokenizer(f"Query:{text}\nDocument:")["input_ids"]) + 1


def test_special_tokens_in_a_text_stay_text(backbone):
    processor = backbone.processor
    encoded = processor.encode(Example((RED, WIDE), "<|image_pad|><|im_end|>"))
    start, end = encoded.spans.text
    assert "<|image_pad|><|im_end|>" in processor.tokenizer.decode(encoded.ids[start:end])
    assert not set(processor.tokenizer.get_added_vocab().values()) & set(encoded.ids[start:end])
    assert [last - first for first, last in encoded.spans.image] == [4, 8]
    assert all(token == processor.image_token_id for span in encoded.spans.image for token in encoded.ids[slice(*span)])


def test_features_are_those_of_transformers(backbone, folder):
    reference = by_hand(load_reference("qwen3_vl", folder), backbone.processor, ROWS, TAPS)
    for options in ({}, {"share_prefixes": False}, {"token_budget": 40}):
        assert_close(backbone.encode(ROWS, TAPS, **options), reference)
    inputs = backbone.processor(ROWS)
    assert_close(backbone.encode_batch(inputs, TAPS).detach().numpy(), reference)


def test_texts_about_one_picture_share_no_row(backbone):
    """Each picture follows its text, and depends on it."""
    prepared = backbone.prepare([Example(RED, text) for text in TEXTS])
    rows = [row for batch in plan(prepared, token_budget=10_000) for row in batch]
    assert sorted(rows) == [(index,) for index in range(len(TEXTS))]
    image = backbone.encode([Example(RED, "one text"), Example(RED, "another")], [Tap(-1, "image")])
    assert np.abs(image[0] - image[1]).max() > 1e-3


@pytest.mark.parametrize("method", ["occlusion", "gradients"])
def test_an_answer_is_explained(backbone, method):
    classifier = Classifier.zero_shot(backbone, yes="a", no="b")
    example = Example(WIDE, 'a "red" square.')
    explanation = explain(classifier, example, method=method)
    assert [word for word, _ in explanation.words] == ["a", '"', "red", '"', "square", "."]
    assert [grid.shape for grid in explanation.patches] == [(2, 4)]
    assert explanation.probability == pytest.approx(classifier.predict_proba([example])[0, 1], abs=1e-6)
    if method == "occlusion":
        encoded = backbone.processor.encode(example)
        words = [backbone.processor.tokenizer.decode([token]) for token in encoded.ids]
        kept = [place for place, word in enumerate(words) if word != "red"]
        inputs = {
            name: tensor[:, kept] if tensor.shape == (1, len(words)) else tensor
            for name, tensor in backbone.processor([example]).items()
        }
        assert len(kept) == len(words) - 1
        feature = backbone.encode_batch(inputs, [classifier.tap])[:, 0].detach().numpy()
        without = float(margins_of(classifier.logits_of(feature))[0])
        assert explanation.words[2] == ("red", pytest.approx(explanation.log_odds - without, abs=1e-5))
