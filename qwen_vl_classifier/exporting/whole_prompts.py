"""Check whether an engine that tokenises whole prompts reads the same tokens as the classifier.

The classifier tokenises text and template apart. Between special tokens, where the text stands in Qwen's own templates,
that is the same; beside words, such as those of a prompt of one's own, a word of the template and one of the text may
become one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from PIL import Image

from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.prompts.prompt import TEXT_MARK
from qwen_vl_classifier.backbone.prompts.thinking import render_prompt
from qwen_vl_classifier.data.example import Example

_TEXTS = ("a", "A b.", "1", "(a)", "a?", "é", "文")
_BLANKS = (" a", "a ")
_BREAKS = ("\na", "a\n")  # without picture, clients refuse a text that begins with a line break


def joined_text(processor: Processor) -> str | None:
    """Return a text that has other tokens where the prompt is tokenised as a whole; `None` if none was found.

    Args:
        processor: Puts texts into the classifier's prompt.
    """
    picture = Image.new("RGB", (processor.token_side, processor.token_side))
    strips = "texts" in processor.prompt_facts()  # the template strips blanks from texts
    for images in (0, 1):
        rendered = render_prompt(processor.tokenizer, processor.chat_template, TEXT_MARK, images=images)
        texts = _TEXTS if strips else _TEXTS + _BLANKS + _BREAKS * images
        for text in texts:
            whole = processor.tokenizer(rendered.replace(TEXT_MARK, text), add_special_tokens=False)["input_ids"]
            ids = processor.encode(Example([picture] * images or None, text)).ids
            if list(whole) != _with_pictures_as_one(ids, processor.image_token_id):
                return text
    return None


def _with_pictures_as_one(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Return token ids with one token for each picture."""
    return [token for key, run in groupby(ids) for token in ([key] if key == image_token_id else run)]
