"""transformers' own `DecisionPipeline` over a checkpoint, without torchvision: what zero-shot answers are held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ProcessorMixin

from qwen_vl_classifier import Backbone


class PictureProcessor(ProcessorMixin):
    """A processor of pictures and text; those of transformers take videos too, for which they need torchvision."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        grid = image_inputs["image_grid_thw"][image_idx]
        return self.image_token * int(grid.prod() // self.image_processor.merge_size**2)


def decision_pipeline(folder: Path, model_class: type, backbone: Backbone) -> Any:
    """Load a checkpoint into the pipeline, with the tokeniser and the picture settings of a backbone."""
    from transformers.pipelines import DecisionPipeline

    processor = PictureProcessor(
        backbone.processor.image_processor,
        transformers.AutoTokenizer.from_pretrained(folder),
        chat_template=backbone.processor.chat_template,
    )
    processor.tokenizer.chat_template = backbone.processor.chat_template
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[attr-defined]
    return DecisionPipeline(model=model, tokenizer=processor.tokenizer, processor=processor, device="cpu")
