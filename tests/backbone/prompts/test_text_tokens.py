"""Texts that are too long cost an error, not minutes, and none that fits is refused."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.prompts import text_tokens
from qwen_vl_classifier.backbone.prompts.text_tokens import TextTokens, position_limit
from qwen_vl_classifier.errors import DataError, TextError
from tests import nano


class Counted:
    """A tokenizer that notes how many characters it was given."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self._tokenizer(text, **options)

    def get_vocab(self):
        return self._tokenizer.get_vocab()


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tiny_backbone.processor.tokenizer


PIECES = st.sampled_from(
    ["the ", "a", " ", "\n", "7", "语", "e\u0301", "\u1100\u1161\u11a8", "🙂", "<|im_end|>", "-----"]
)


@given(text=st.lists(PIECES, max_size=60).map("".join), most=st.integers(1, 40))
def test_exactly_the_texts_that_fit_are_tokenised(tokenizer, text, most):
    wanted = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_tokens, "_SLICE", 50)
        if len(wanted) <= most:
            assert TextTokens(tokenizer, most).ids(text) == wanted
        else:
            with pytest.raises(TextError, match=f"expected at most {most}"):
                TextTokens(tokenizer, most).ids(text)


@pytest.mark.parametrize("unit", ["a", " ", "A word. ", "语言", "e\u0301", "abcdefghij0123456789+/"])
@pytest.mark.parametrize("length", [2_000_000, 40_000_000])
def test_of_a_text_of_many_megabytes_little_is_tokenised(tokenizer, unit, length):
    counted = Counted(tokenizer)
    with pytest.raises(TextError, match="more than 1,000 tokens"):
        TextTokens(counted, 1000).ids(unit * (length // len(unit)))
    assert counted.characters <= 32_768


def test_composition_joins_no_more_characters_than_is_taken_for_granted():
    most = max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)
    assert most == text_tokens._COMPOSED


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("short") / "nano")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"max_position_embeddings": 32768', '"max_position_embeddings": 64')
    )
    return Backbone.load(folder, device="cpu", dtype="float32")


class TestPositions:
    """`max_position_embeddings`."""

    def test_a_text_beyond_them_is_an_error_that_names_the_row(self, short):
        taps = [Tap(1, "mean")]
        rows = [Example(None, "short"), Example(None, "word " * 500)]
        with pytest.raises(DataError, match=r"row 2.*tokens; expected at most 64") as caught:
            short.encode(rows, taps)
        assert isinstance(caught.value, DataError)
        assert short.encode(rows[:1], taps).shape == (1, 1, nano.HIDDEN_SIZE)

    def test_prompt_and_text_together_count(self, short):
        text = "a"
        while len(short.processor.tokenizer(text)["input_ids"]) < 60:
            text += " a"
        with pytest.raises(TextError, match=r"takes \d+ positions, and the model has 64"):
            short.processor.encode(Example(None, text))

    def test_a_picture_takes_the_positions_of_its_side_and_not_its_tokens(self, short):
        encoded = short.processor.encode(Example(Image.new("RGB", (280, 280)), "x"))
        assert len(encoded.ids) > 100

    @pytest.mark.parametrize(
        ("config", "wanted"),
        [
            ({"max_position_embeddings": 128000}, 128000),
            ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default"}}, 32768),
            (
                {
                    "max_position_embeddings": 32768,
                    "rope_parameters": {
                        "rope_type": "yarn",
                        "factor": 4.0,
                        "original_max_position_embeddings": 32768,
                    },
                },
                131072,
            ),
            ({}, None),
        ],
    )
    def test_stretched_as_the_configuration_says(self, config, wanted):
        assert position_limit(SimpleNamespace(**config)) == wanted


def test_a_bound_of_the_users_own(tiny_backbone):
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype="float32", num_layers=1, max_text_tokens=5)
    backbone.processor.encode(Example(None, "one two"))
    with pytest.raises(TextError, match="expected at most 5"):
        backbone.processor.encode(Example(None, "one two three four five six seven eight"))
    assert backbone.fingerprint == tiny_backbone.fingerprint  # features do not depend on it


def test_one_thread_at_a_time_is_in_the_tokenizer():
    """It keeps from call to call whether special tokens in a text count, and another's call would change that."""
    inside, most = 0, 0

    def tokenizer(text, **_):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0)  # another thread may run now
        inside -= 1
        return {"input_ids": [0], "offset_mapping": [(0, 1)]}

    texts = TextTokens(tokenizer, None)

    def work(call):
        for _ in range(300):
            call("a")

    threads = [threading.Thread(target=work, args=(call,)) for call in (texts.ids, texts.offsets) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_copy_has_a_lock_of_its_own(tiny_backbone):
    texts = TextTokens(tiny_backbone.processor.tokenizer, 5)
    for same in (copy.deepcopy(texts), pickle.loads(pickle.dumps(texts))):
        with texts.lock:
            assert same.ids("a red circle") == tiny_backbone.processor.tokenizer("a red circle").input_ids
        assert same.most == 5
