"""Thinking checkpoints: the answer is read behind an empty thinking block, not where a train of thought begins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.thinking import DEFAULT_CHAT_TEMPLATE
from tests import nano

EXAMPLE = Example(Image.new("RGB", (56, 56), "red"), "It is red.")
ANSWER = "<|im_start|>assistant\n"
CLOSED = "<think>\n\n</think>\n\n"

# How templates of published Thinking checkpoints end: an expression in a block, or text; with a last newline or not.
_MESSAGES = DEFAULT_CHAT_TEMPLATE.partition("{% if add_generation_prompt %}")[0]
OPEN = {
    "expression": _MESSAGES
    + "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}\n",
    "text": _MESSAGES + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "no newline": _MESSAGES + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}\n",
    "two newlines": _MESSAGES + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n{% endif %}",
    "asked by a variable": _MESSAGES
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    + "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    + "{%- else %}{{- '<think>\\n' }}{%- endif %}{%- endif %}",
    "to its end": _MESSAGES + "<|im_start|>assistant\n<think>\n   ",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen3_vl", tmp_path_factory.mktemp("nano") / "thinking", chat_template=False)


def with_template(folder: Path, template: str, *, layers: int | None = 1) -> Backbone:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return Backbone.load(folder, device="cpu", dtype="float32", num_layers=layers)


def prompt(processor: Processor, **options) -> str:
    """Render one text as transformers renders it with the template that is in use."""
    message = [{"role": "user", "content": [{"type": "text", "text": "It is red."}]}]
    given = {"tokenize": False, "add_generation_prompt": True, **options}
    return processor.tokenizer.apply_chat_template(message, chat_template=processor.chat_template, **given)


@pytest.mark.parametrize("name", OPEN)
def test_an_open_block_is_closed(folder, name):
    processor = with_template(folder, OPEN[name]).processor
    wanted = "<think>\n   \n</think>\n\n" if name == "to its end" else CLOSED
    assert prompt(processor).endswith(f"It is red.<|im_end|>\n{ANSWER}{wanted}")
    ids = processor.encode(EXAMPLE).ids
    assert processor.tokenizer.decode(ids).endswith(f"It is red.<|im_end|>\n{ANSWER}{wanted}")


@pytest.mark.parametrize(
    "end", [ANSWER, f"{ANSWER}{CLOSED}", f"<think>\n{ANSWER}"], ids=["none", "closed", "elsewhere"]
)
def test_other_templates_stay_as_they_are(folder, end):
    template = _MESSAGES + "{% if add_generation_prompt %}" + end + "{% endif %}"
    assert with_template(folder, template).processor.chat_template == template


def test_conversations_without_a_generation_prompt_stay_as_they_are(folder):
    processor = with_template(folder, OPEN["text"]).processor
    assert "think" not in prompt(processor, add_generation_prompt=False)


def test_the_template_in_use_is_recorded_and_is_part_of_the_fingerprint(folder, tmp_path):
    backbone = with_template(folder, OPEN["text"])
    again = Processor(
        backbone.processor.tokenizer,
        backbone.processor.image_processor,
        chat_template=backbone.processor.chat_template,
        image_token_id=backbone.processor.image_token_id,
        video_token_id=backbone.processor.video_token_id,
    )
    assert again.chat_template == backbone.processor.chat_template != OPEN["text"]
    assert backbone.processor.fingerprint()["prompt"] == backbone.processor.chat_template
    backbone.save(tmp_path / "saved")
    assert Backbone.load(tmp_path / "saved", device="cpu").processor.chat_template == again.chat_template
    assert backbone.fingerprint != with_template(folder, OPEN["text"].replace("<think>\n", "")).fingerprint


def test_yes_and_no_are_read_behind_the_block(folder):
    """The zero-shot answer equals that of transformers' own model on the prompt with an empty thinking block."""
    backbone = with_template(folder, OPEN["expression"], layers=None)
    probability = Classifier.zero_shot(backbone, yes="a", no="b").predict_proba([EXAMPLE])[0, 1]
    model = nano.reference_class("qwen3_vl").from_pretrained(folder, dtype=torch.float32).eval()
    processor = backbone.processor
    pictures = processor.read_pictures(EXAMPLE)
    count = int(np.prod(pictures.grids[0])) // processor.merge_size**2
    picture = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
    text = f"<|im_start|>user\n{picture}It is red.<|im_end|>\n{ANSWER}{CLOSED}"
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == processor.image_token_id).long(),
            pixel_values=torch.tensor(pictures.pixel_values),
            image_grid_thw=torch.tensor(pictures.grids),
        ).logits[0, -1]
    yes, no = (processor.tokenizer(word)["input_ids"][0] for word in "ab")
    assert probability == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-4)
    assert backbone.encode([EXAMPLE], [Tap(-1, "last")]).shape == (1, 1, nano.HIDDEN_SIZE)
