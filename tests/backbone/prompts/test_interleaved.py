"""Pictures amid the text of a prompt; `tests/serving/decisions` holds its tokens to those of transformers."""

from __future__ import annotations

import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Example
from qwen_vl_classifier.backbone.prompts.thinking import DEFAULT_CHAT_TEMPLATE
from qwen_vl_classifier.errors import CheckpointError, TextError
from tests.backbone.templates import with_chat_template

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 150), "blue")


def test_pictures_before_the_text_give_the_prompt_of_a_classifier(tiny_backbone: Backbone) -> None:
    processor = tiny_backbone.processor
    pictures = processor.resize_pictures([RED, BLUE])
    whole = processor.encode(Example((RED, BLUE), "a pair"))
    placed = processor.encode_interleaved([None, None, "a pair"], pictures)
    assert placed.ids == whole.ids
    assert placed.spans.image == whole.spans.image
    assert not placed.shares_prefix


def test_each_picture_stands_where_it_belongs(tiny_backbone: Backbone) -> None:
    processor = tiny_backbone.processor
    placed = processor.encode_interleaved(["a ", None, " or ", None, "?"], processor.resize_pictures([BLUE, RED]))
    (first, second), ids = placed.spans.image, placed.ids
    alone = [processor.encode(Example(picture, "a")).spans.image[0] for picture in (BLUE, RED)]
    assert [end - start for start, end in placed.spans.image] == [end - start for start, end in alone]
    words = [ids[: first[0]], ids[first[1] : second[0]], ids[second[1] :]]
    texts = [processor.tokenizer.decode(part) for part in words]
    assert texts[0].endswith("a <|vision_start|>")
    assert texts[1] == "<|vision_end|> or <|vision_start|>"
    assert texts[2].startswith("<|vision_end|>?<|im_end|>")


def test_special_tokens_in_a_text_stay_text(tiny_backbone: Backbone) -> None:
    processor = tiny_backbone.processor
    placed = processor.encode_interleaved(["<|image_pad|><|im_end|>"], processor.resize_pictures([]))
    assert processor.image_token_id not in placed.ids
    assert placed.ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_text_of_many_pieces_has_one_limit(tiny_backbone: Backbone) -> None:
    processor = with_chat_template(tiny_backbone.processor, DEFAULT_CHAT_TEMPLATE, most=24)
    pictures = processor.resize_pictures([RED])
    processor.encode_interleaved(["a b c", None, "d e f"], pictures)
    with pytest.raises(TextError, match="expected at most 24"):
        processor.encode_interleaved(["a b c " * 6, None, "d e f " * 6], pictures)


@pytest.mark.parametrize(
    "markup", ["Picture {{ loop.index }}: <|vision_start|><|image_pad|><|vision_end|>", "\nPicture<|image_pad|>"]
)
def test_a_template_with_rules_of_its_own_is_refused(tiny_backbone: Backbone, markup: str) -> None:
    template = DEFAULT_CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", markup)
    assert template != DEFAULT_CHAT_TEMPLATE
    processor = with_chat_template(tiny_backbone.processor, template)
    assert tiny_backbone.processor.interleaves
    assert not processor.interleaves
    assert processor.encode_interleaved(["a"], processor.resize_pictures([])).ids
    with pytest.raises(CheckpointError, match="put them before it"):
        processor.encode_interleaved(["a", None], processor.resize_pictures([RED]))


def test_a_template_that_strips_texts(tiny_backbone: Backbone) -> None:
    template = DEFAULT_CHAT_TEMPLATE.replace("{{ part.text }}", "{{ part.text | trim }}")
    processor = with_chat_template(tiny_backbone.processor, template)
    none = processor.resize_pictures([])
    assert processor.encode_interleaved([" \n a "], none).ids == processor.encode_interleaved(["a"], none).ids
