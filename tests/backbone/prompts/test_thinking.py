"""Thinking checkpoints: the answer is read behind an empty thinking block, not where a train of thought begins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.prompts.thinking import DEFAULT_CHAT_TEMPLATE
from qwen_vl_classifier.cli.main import main
from tests import nano
from tests.backbone.prompts.chat_templates import (
    ALWAYS_THINKS,
    QWEN_3_5_SMALL,
    QWEN_3_8,
    QWEN_3_VL_THINKING,
    SWITCHABLE,
)
from tests.backbone.templates import with_chat_template

RED = Image.new("RGB", (56, 56), "red")
EXAMPLE = Example(RED, "It is red.")
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


def rendered_whole(processor: Processor, template: str, example: Example, **variables) -> str:
    """Render with text and all, as transformers does, and expand the pictures."""
    content = [{"type": "image"} for _ in example.images] + [{"type": "text", "text": example.text}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        **variables,
    )
    for _, height, width in processor.read_pictures(example).grids:
        text = text.replace("<|image_pad|>", "<|placeholder|>" * (height * width // 4), 1)
    return text.replace("<|placeholder|>", "<|image_pad|>")


@pytest.fixture(scope="module")
def plain(folder) -> Processor:
    return Backbone.load(folder, device="cpu", dtype="float32", num_layers=1).processor


@pytest.fixture(scope="module", params=SWITCHABLE)
def switched(request, plain) -> tuple[Processor, str]:
    """A processor with one of the templates that can turn thinking off, and the template."""
    return with_chat_template(plain, SWITCHABLE[request.param]), SWITCHABLE[request.param]


class TestTemplatesOfQwen35:
    """Prompts are those of the official templates with thinking turned off, to the byte."""

    @pytest.mark.parametrize("images", [(), (RED, RED)], ids=len)
    def test_the_prompt_is_the_official_one_without_thinking(self, switched, images):
        own, template = switched
        example = Example(images, "It is red.")
        expected = rendered_whole(own, template, example, enable_thinking=False)
        assert expected.endswith(f"It is red.<|im_end|>\n{ANSWER}{CLOSED}")
        assert own.encode(example).ids == own.tokenizer(expected)["input_ids"]
        assert rendered_whole(own, own.chat_template, example) == expected  # whoever reads the record

    def test_thinking_would_be_on_without_the_change(self, plain):
        for name, template in SWITCHABLE.items():
            rendered = rendered_whole(plain, template, EXAMPLE)
            assert rendered.endswith(f"{ANSWER}{CLOSED}" if template == QWEN_3_5_SMALL else f"{ANSWER}<think>\n"), name
        assert "Think for a long time." in rendered_whole(plain, QWEN_3_8, EXAMPLE)

    def test_changing_a_template_twice_changes_nothing(self, switched):
        own, _ = switched
        assert with_chat_template(own, own.chat_template).chat_template == own.chat_template

    @pytest.mark.parametrize("template", [ALWAYS_THINKS, QWEN_3_VL_THINKING], ids=["refuses", "knows no variable"])
    def test_where_thinking_cannot_be_turned_off_the_block_is_closed(self, plain, template):
        own = with_chat_template(plain, template)
        expected = rendered_whole(plain, template, EXAMPLE) + "\n</think>\n\n"
        assert expected.endswith(f"{ANSWER}{CLOSED}")
        assert own.encode(EXAMPLE).ids == own.tokenizer(expected)["input_ids"]

    def test_the_variable_alone_is_no_reason_to_change_a_template(self, plain):
        assert with_chat_template(plain, QWEN_3_5_SMALL).chat_template == QWEN_3_5_SMALL

    def test_a_block_that_stays_open_with_thinking_off_is_closed(self, plain):
        template = _MESSAGES + "{{ enable_thinking }}<|im_start|>assistant\n<think>\n"
        own = with_chat_template(plain, template)
        assert prompt(own).endswith(f"False{ANSWER}{CLOSED}")
        assert with_chat_template(own, own.chat_template).chat_template == own.chat_template


class TestBlanksAroundAText:
    """A template of Qwen3.5 strips what a user wrote; texts are put in later, and stripped alike."""

    @settings(max_examples=40)
    @given(text=st.text(alphabet=" \n\t\u3000a.é<", max_size=8), picture=st.booleans())
    def test_any_text_is_that_of_the_official_prompt(self, plain, text, picture):
        own = with_chat_template(plain, SWITCHABLE["3.5"])
        example = Example(RED if picture else None, text)
        expected = rendered_whole(plain, SWITCHABLE["3.5"], example, enable_thinking=False)
        assert own.encode(example).ids == own.tokenizer(expected)["input_ids"]

    @pytest.mark.parametrize(("images", "kept"), [(None, "a  b"), (RED, "  a  b")], ids=["text alone", "picture"])
    def test_what_is_stripped_depends_on_what_is_before(self, plain, images, kept):
        own = with_chat_template(plain, SWITCHABLE["3.5"])
        example = Example(images, "  a  b \n")
        encoded = own.encode(example)
        assert own.tokenizer.decode(encoded.ids[slice(*encoded.spans.text)]) == kept
        assert own.text_span(encoded.ids) == encoded.spans.text
        offsets = own.text_offsets(example)
        assert len(offsets) == encoded.spans.text[1] - encoded.spans.text[0]
        assert "".join(example.text[start:end] for start, end in offsets) == kept

    @pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, QWEN_3_VL_THINKING], ids=["default", "Qwen3-VL"])
    def test_other_templates_keep_them(self, plain, template):
        own = with_chat_template(plain, template)
        encoded = own.encode(Example(RED, "  a  b \n"))
        assert own.tokenizer.decode(encoded.ids[slice(*encoded.spans.text)]) == "  a  b \n"

    def test_the_fingerprint_tells_that_texts_are_stripped(self, plain):
        assert with_chat_template(plain, SWITCHABLE["3.5"]).fingerprint()["texts"] == "stripped"
        for template in (DEFAULT_CHAT_TEMPLATE, QWEN_3_VL_THINKING):
            assert "texts" not in with_chat_template(plain, template).fingerprint()


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


def test_a_saved_classifier_says_that_thinking_is_off(folder, tmp_path, capsys):
    backbone = with_template(folder, QWEN_3_8, layers=None)
    saved = Classifier.zero_shot(backbone, yes="a", no="b").save(tmp_path / "saved")
    manifest = json.loads((saved / "classifier.json").read_text())
    assert manifest["prompt"] == backbone.processor.chat_template != QWEN_3_8
    assert "| thinking | turned off" in (saved / "README.md").read_text()
    assert Classifier.load(saved, device="cpu").backbone.fingerprint == backbone.fingerprint
    for what in (saved, folder):
        assert main(["info", str(what)]) == 0
        assert "turned off in the chat template" in capsys.readouterr().out
    with_template(folder, DEFAULT_CHAT_TEMPLATE)
    assert main(["info", str(folder)]) == 0
    assert "thinking" not in capsys.readouterr().out.replace(str(folder), "")


@pytest.mark.parametrize(
    ("family", "template"),
    [("qwen3_vl", OPEN["expression"]), ("qwen3_5", QWEN_3_8), ("qwen3_5_moe", SWITCHABLE["3.5"])],
)
def test_yes_and_no_are_read_behind_the_block(family, template, tmp_path):
    """The zero-shot answer equals that of transformers' own model on the prompt with an empty thinking block."""
    folder = nano.make_checkpoint(family, tmp_path / "nano", chat_template=False)
    backbone = with_template(folder, template, layers=None)
    probability = Classifier.zero_shot(backbone, yes="a", no="b").predict_proba([EXAMPLE])[0, 1]
    model = nano.reference_class(family).from_pretrained(folder, dtype=torch.float32).eval()
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
            pixel_values=processor.patches(list(map(torch.from_numpy, pictures.pixels)), torch.float32),
            image_grid_thw=torch.tensor(pictures.grids),
        ).logits[0, -1]
    yes, no = (processor.tokenizer(word)["input_ids"][0] for word in "ab")
    assert probability == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-5)
    assert backbone.encode([EXAMPLE], [Tap(-1, "last")]).shape == (1, 1, nano.HIDDEN_SIZE)
