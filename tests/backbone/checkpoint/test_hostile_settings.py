"""Settings that ask for minutes, gigabytes or nonsense are refused in one line before anything is built from them."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from qwen_vl_classifier import Tap
from qwen_vl_classifier.backbone.checkpoint import model as model_module
from qwen_vl_classifier.errors import ConfigError
from tests.backbone.checkpoint_folders import EXAMPLES, edit, load, refusal

TAPS = [Tap(-1, "mean")]


@pytest.fixture
def folder(kind_checkpoint, tmp_path):
    family, folder = kind_checkpoint
    return shutil.copytree(folder, tmp_path / family)


@pytest.fixture
def one(nano_folder, tmp_path):
    return shutil.copytree(nano_folder("qwen2_5_vl"), tmp_path / "one")


def change(folder, part: str, **changes) -> None:
    """Change fields of one part of a `config.json`, which may be flat."""
    content = json.loads((folder / "config.json").read_text())
    content.get(part, content).update(changes)
    (folder / "config.json").write_text(json.dumps(content))


TEXT = {
    "num_hidden_layers": [0, -1, 1_000_000, 10**30, 1.5e308, "x"],
    "hidden_size": [0, 10**12],
    "intermediate_size": [0, 10**12],
    "vocab_size": [0, 10**12],
    "num_attention_heads": [0, 10**9, 3],
    "num_key_value_heads": [3, 10**9],
    "rms_norm_eps": [-1, "x", 1e300],
    "max_position_embeddings": [0, 10**30],
}
VISION = {
    "depth": [0, -1, 1_000_000, 10**30],
    "patch_size": [0, -1, 10**9],
    "temporal_patch_size": [0, 10**9],
    "spatial_merge_size": [0, 10**9],
    "num_heads": [0, 3, 10**9],
    "hidden_size": [0, 10**12],
}


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (part, field, value)
        for part, fields in (("text_config", TEXT), ("vision_config", VISION))
        for field, values in fields.items()
        for value in values
    ],
)
def test_impossible_sizes_build_nothing(folder, part, field, value, monkeypatch):
    built = []
    shapes = model_module._expected_shapes
    monkeypatch.setattr(model_module, "_expected_shapes", lambda *given: built.append(given) or shapes(*given))
    change(folder, part, **{field: value})
    refusal(folder)
    sizes = {"num_hidden_layers", "depth"}
    assert not (built and field in sizes)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite(folder, text):
    change(folder, "text_config", rope_theta="PLACE")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"PLACE"', text))
    assert "rope_theta" in refusal(folder)
    change(folder, "text_config", rope_theta=10_000, another=float("nan"))
    assert "not finite" in refusal(folder)


@pytest.mark.parametrize("asked", [200, 1024])
@pytest.mark.parametrize(("part", "field"), [("text_config", "num_hidden_layers"), ("vision_config", "depth")])
def test_more_layers_than_the_files_have(folder, part, field, asked, monkeypatch):
    monkeypatch.setattr(model_module, "_expected_shapes", lambda *_: pytest.fail("it was built"))
    change(folder, part, **{field: asked, "layer_types": None})
    assert f"asks for {asked:,} " in refusal(folder)


@pytest.mark.parametrize("sections", [[], [1], [0] * 1000, ["a", "b", "c"], [-8, 8, 8], [None] * 3, {"a": 1}, 7])
def test_sections_of_positions(one, sections):
    edit(one / "config.json", rope_scaling={"type": "mrope", "mrope_section": sections})
    assert "mrope_section" in refusal(one)


@pytest.mark.parametrize("change", [{"factor": "x"}, {"factor": 1e300}, {"factor": [1]}, {"rope_theta": -1}])
def test_stretched_positions(one, change):
    rotation = {"type": "mrope", "mrope_section": [2, 3, 3], "original_max_position_embeddings": 32768}
    edit(one / "config.json", rope_scaling=rotation | change)
    assert next(iter(change)) in refusal(one)


@pytest.mark.parametrize("indexes", [list(range(5000)), "all", 7])
def test_lists_of_layers(nano_folder, tmp_path, indexes):
    folder = shutil.copytree(nano_folder("qwen3_vl"), tmp_path / "three")
    change(folder, "vision_config", deepstack_visual_indexes=indexes)
    assert "deepstack_visual_indexes" in refusal(folder)


def test_a_window_of_less_than_a_patch(one):
    change(one, "vision_config", window_size=3)
    assert "window_size" in refusal(one)


@pytest.mark.parametrize("limits", [(4 * 10**8, 4 * 10**8), (2 * 10**7, 2 * 10**7), (1, 2 * 10**7), (3 * 10**6, 10**7)])
def test_pixels_to_which_pictures_are_resized(one, limits):
    smallest, largest = limits
    assert "costs minutes" in refusal(one, ConfigError, min_pixels=smallest, max_pixels=largest)
    edit(one / "preprocessor_config.json", min_pixels=smallest, max_pixels=largest)
    assert "costs minutes" in refusal(one, ConfigError)


@pytest.mark.parametrize(
    "setting", ["preprocess", "_preprocess", "resize", "patchify", "normalize", "do_center_crop", "do_pad", "__class__"]
)
def test_other_settings_of_pictures_have_no_effect(nano_folder, one, setting):
    expected = load(nano_folder("qwen2_5_vl")).encode(EXAMPLES, TAPS)
    for value in (7, {"height": 10**6, "width": 10**6}):
        edit(one / "preprocessor_config.json", **{setting: value})
        assert (load(one).encode(EXAMPLES, TAPS) == expected).all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_std", [1e-30] * 3),
        ("image_mean", [1e30] * 3),
        ("image_mean", [0] * 1000),
        ("rescale_factor", "x"),
        ("rescale_factor", 1e30),
        ("do_resize", 7),
        ("do_normalize", "x"),
        ("patch_size", [0] * 1000),
        ("merge_size", 0),
    ],
)
def test_impossible_settings_of_pictures(one, setting, value):
    edit(one / "preprocessor_config.json", **{setting: value})
    refusal(one)


def expression(text: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}


def added(number: int, content: str) -> dict:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 2000 + number, "content": content, "special": True, **switches}


TOKENISERS = {
    "exponential time": {"pre_tokenizer": expression("(a+)+$")},
    "gigabytes": {"pre_tokenizer": expression("(((a{1000}){1000}){1000}){1000}")},
    "within others": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [expression("(a|a)*$")]}},
    "a replaced expression": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}},
    "a text that grows": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}},
    "a text in front": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "deep": {"normalizer": eval("{'type': 'Sequence', 'normalizers': [" * 80 + "]}" * 80)},
    "a decoder": {"decoder": {"type": "Replace", "pattern": {"Regex": "(a{1000}){1000}"}, "content": ""}},
    "another model": {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "many added tokens": {"added_tokens": [added(number, f"<{number}>") for number in range(40_000)]},
    "a long added token": {"added_tokens": [added(0, "q" * 10**6)]},
}


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", TOKENISERS)
def test_a_tokeniser_that_costs_more_than_its_text(one, name, tokenizer_class):
    edit(one / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    content = json.loads((one / "tokenizer.json").read_text()) | TOKENISERS[name]
    (one / "tokenizer.json").write_text(json.dumps(content))
    before = time.process_time()
    assert "tokenizer.json" in refusal(one)
    assert time.process_time() - before < 20  # of the processor, not of the clock; the library would take minutes


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_tokens_in_other_files(one, file):
    path = one / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"extra_special_tokens": [f"<{number}>" for number in range(40_000)]}))
    assert file in refusal(one)
    path.write_text(json.dumps(content | {"eos_token": "q" * 10**5}))
    assert file in refusal(one)


def test_a_token_that_the_model_does_not_have(one):
    edit(one / "tokenizer_config.json", pad_token="<another>")  # it pads as well as any
    load(one).encode(EXAMPLES, TAPS)
