"""Processors with chat templates of their own."""

from __future__ import annotations

from qwen_vl_classifier.backbone.processor import Processor


def with_chat_template(processor: Processor, template: str | None, *, most: int | None = None) -> Processor:
    """Return the same processor with another chat template, and with a limit on the tokens of a text if given."""
    return Processor(
        processor.tokenizer,
        processor.image_processor,
        chat_template=template,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        max_text_tokens=most,
    )
