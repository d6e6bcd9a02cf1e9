"""The built-in checkpoint is what its design writes, in the hub's own layout."""

from __future__ import annotations

import json

import pytest

from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN
from tools.tiny.design import SPECIAL_TOKENS, words, write_design

CHECKPOINT = BUILTIN["builtin:tiny"]
MOST_BYTES = 12 * 10**6


def test_design_writes_the_files_that_are_shipped(tmp_path):
    write_design(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (CHECKPOINT / path.name).read_bytes(), path.name


def test_it_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MOST_BYTES


def test_words_are_one_token_in_both_positions(tiny_backbone):
    tokenizer = tiny_backbone.processor.tokenizer
    for word in [*words(), "Yes", "No", "yes", "no"]:
        for text in (word, f" {word}"):
            assert len(tokenizer(text)["input_ids"]) == 1, text


@pytest.mark.parametrize("text", ["naïve 日本語 🎈", "tabs\tand\nlines\r\n", "", " ", "12345", "ﬁ"])
def test_any_text_is_covered(tiny_backbone, text):
    import unicodedata

    tokenizer = tiny_backbone.processor.tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_special_tokens_are_those_of_qwen(tiny_backbone):
    tokenizer = tiny_backbone.processor.tokenizer
    config = json.loads((CHECKPOINT / "config.json").read_text())
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
        assert len(tokenizer(token, split_special_tokens=True)["input_ids"]) > 1
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert config["vocab_size"] >= len(tokenizer)
