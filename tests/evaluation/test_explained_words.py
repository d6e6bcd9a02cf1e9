"""Words: which tokens they are made of, in any script."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.evaluation.explanation import join_tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is the cafe\u0301 red?", ["Is", "the", "cafe\u0301", "red", "?"]),
        ("  don't\n2024-05 (x)  ", ["don't", "2024", "-", "05", "(", "x", ")"]),
        ("Это красный круг.", ["Это", "красный", "круг", "."]),
        ("यह लाल है", ["यह", "लाल", "है"]),
        ("图片 blue", ["图", "片", "blue"]),
        ("빨간 원", ["빨간", "원"]),
        ("<|image_pad|>", ["<|", "image", "_", "pad", "|>"]),
        ("", []),
    ],
)
def test_tokens_are_joined_to_words(tiny_backbone, text, words):
    tokens = tiny_backbone.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    if "<" in text:  # Qwen's processor splits it up, as `explain` does
        offsets = [(index, index + 1) for index in range(len(text))]
    joined = join_tokens(text, offsets)
    assert [word for word, _ in joined] == words
    assert [token for _, own in joined for token in own] == list(range(len(offsets)))


def test_words_that_share_a_token_are_one():
    offsets = [(0, 1), (1, 5), (5, 7), (7, 9), (9, 10), (10, 13)]  # a| (b)| c|-d| |e。f
    joined = join_tokens("a (b) c-d e。f", offsets)
    assert joined == [("a", [0]), ("(b)", [1]), ("c", [2]), ("-d", [3]), ("e。f", [4, 5])]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_character_and_no_token_is_lost(text):
    cuts = [*range(0, len(text), 3), len(text)]
    offsets = list(itertools.pairwise(cuts))
    joined = join_tokens(text, offsets)
    assert [token for _, own in joined for token in own] == list(range(len(offsets)))
    assert "".join("".join(word.split()) for word, _ in joined) == "".join(text.split())
