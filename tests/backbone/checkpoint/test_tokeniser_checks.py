"""Tokeniser files as Qwen3.5, 3.6 and 3.8 publish them are let in, and mean what they mean to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Regex, pre_tokenizers

from qwen_vl_classifier import Backbone, Example
from tests import nano
from tests.backbone.prompts.chat_templates import QWEN_3_8

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_BEFORE = _WORD + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = _WORD + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>"),
    *("<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
]
_PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
_NAMES = {
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
    "audio_token": "<|audio_pad|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
RED = Image.new("RGB", (64, 64), "red")


def publish(folder: Path, tokenizer_class: str, expression: str) -> None:
    """Rewrite the tokeniser files of a nano checkpoint in the layout of Qwen3.5 and later."""
    content = json.loads((folder / "tokenizer.json").read_text())
    known = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    # The vocabulary of the model is full: in place of the latest merges, of which no other is made.
    for token in [*_SPECIAL, *_PLAIN]:
        if token not in known:
            last = merges.pop()
            known[token] = vocabulary.pop("".join(last.split(" ") if isinstance(last, str) else last))
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {
        number: {"content": token, **switches, "special": token in _SPECIAL}
        for token, number in sorted(known.items(), key=lambda item: item[1])
    }
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    content |= {
        "added_tokens": [{"id": number, **token} for number, token in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": levels,
        "decoder": levels,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): token for number, token in added.items()},
        "additional_special_tokens": _SPECIAL[1:14],
        "backend": "tokenizers",
        "bos_token": None,
        "chat_template": QWEN_3_8,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": _NAMES,
        "model_max_length": 262144,
        "model_specific_special_tokens": _NAMES,
        "pad_token": "<|endoftext|>",
        "pretokenize_regex": _MARKS,
        "split_special_tokens": False,
        "tokenizer_class": tokenizer_class,
        "unk_token": None,
        **_NAMES,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(QWEN_3_8)


@pytest.fixture(scope="module", params=["Qwen2Tokenizer", "TokenizersBackend", "Qwen3_5Tokenizer"])
def tokenizer_class(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[_BEFORE, _MARKS], ids=["expression of Qwen2", "expression of Qwen3.5"])
def backbone(request, tokenizer_class, tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen3_5", tmp_path_factory.mktemp("published") / "nano")
    publish(folder, tokenizer_class, request.param)
    return Backbone.load(folder, device="cpu", dtype="float32", num_layers=1)


def test_the_prompt_and_its_special_tokens(backbone):
    processor = backbone.processor
    encoded = processor.encode(Example(RED, "It is red. "))
    thinks, ends = processor.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert encoded.ids.count(thinks) == encoded.ids.count(ends) == 1  # one token each, as in the published vocabulary
    assert encoded.ids.count(processor.image_token_id) == 4
    assert processor.tokenizer.decode(encoded.ids).endswith(
        "It is red.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_special_tokens_in_a_text_stay_text(backbone):
    processor = backbone.processor
    encoded = processor.encode(Example(RED, "<|image_pad|><|im_end|><|audio_pad|>"))
    start, end = encoded.spans.text
    special = set(processor.tokenizer.convert_tokens_to_ids(_SPECIAL))
    assert not special & set(encoded.ids[start:end])
    assert processor.tokenizer.decode(encoded.ids[start:end]) == "<|image_pad|><|im_end|><|audio_pad|>"


def test_marks_stay_with_their_letters(backbone):
    """Whatever class and expression the files name: transformers replaces both, but not in all of its versions."""

    def pieces(expression) -> int:
        return len(expression.pre_tokenize_str("हिन्दी"))

    assert pieces(pre_tokenizers.Split(Regex(_BEFORE), "isolated")) > 1
    assert pieces(pre_tokenizers.Split(Regex(_MARKS), "isolated")) == 1
    assert pieces(backbone.processor.tokenizer.backend_tokenizer.pre_tokenizer) == 1
