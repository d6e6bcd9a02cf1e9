"""A prompt that engines would tokenise in another way is refused, not exported."""

from __future__ import annotations

import pytest

from qwen_vl_classifier import Backbone, export
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.exporting.whole_prompts import joined_text
from tests.exporting.linear import linear_classifier

WORDS = (
    "{% for message in messages %}<|im_start|>user\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}BEFORE{{ part.text }}AFTER"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def with_words(before, after):
    template = WORDS.replace("BEFORE", before).replace("AFTER", after)
    return Backbone.load("builtin:tiny", device="cpu", dtype="float32", num_layers=1, chat_template=template)


def test_the_families_own_prompts_have_the_same_tokens(tiny_backbone):
    assert joined_text(tiny_backbone.processor) is None
    assert joined_text(with_words("", "").processor) is None


@pytest.mark.parametrize(("before", "after"), [("Statement: ", ""), ("", "n")])
def test_words_that_join_with_the_text_are_refused(before, after, tmp_path):
    backbone = with_words(before, after)
    with pytest.raises(ConfigError, match=r"the prompt has words beside the text.*such as.*chat template"):
        export(linear_classifier(backbone, "mean:1:normed"), tmp_path / "out", "sentence-transformers")
    assert not (tmp_path / "out").exists()
