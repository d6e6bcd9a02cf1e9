"""The table of families against transformers and against published names of weights."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from qwen_vl_classifier.backbone.families import FAMILIES, family_of
from qwen_vl_classifier.errors import CheckpointError
from tests import nano


def test_every_family_is_tested():
    assert set(FAMILIES) == set(nano.FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_what_transformers_calls_it(model_type):
    family = family_of(model_type, source="somewhere")
    assert family.model_type == model_type
    model_class = family.load_class()
    assert model_class.config_class.model_type == model_type
    assert nano.reference_class(model_type).__module__ == model_class.__module__


def test_weights_have_their_published_names(nano_checkpoint):
    model_type, folder = nano_checkpoint
    family = FAMILIES[model_type]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        published = {name for name in file.keys() if not name.startswith("mtp.")}  # noqa: SIM118 - not a dictionary
    model = nano.reference_class(model_type).from_pretrained(folder).model
    assert {family.published_name(name) for name in model.state_dict()} | {"lm_head.weight"} == published


def test_a_family_that_packed_rows_would_change_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"Qwen4-Exp chooses the keys of a token.*; choose a checkpoint of"):
        family_of("qwen4_exp", source="some/checkpoint")


def test_a_name_of_no_part_is_a_defect():
    with pytest.raises(KeyError, match="lm_head"):
        FAMILIES["qwen2_vl"].published_name("lm_head.weight")


@pytest.mark.parametrize(
    "model_type", ["llava", "qwen2", "qwen2_5_omni", "Qwen2_VL", "", None, 3, ["qwen2_vl"], {"qwen2_vl": 1}, "a\nb"]
)
def test_other_families_are_named_with_those_that_work(model_type):
    with pytest.raises(CheckpointError) as caught:
        family_of(model_type, source="some/checkpoint")
    text = str(caught.value)
    assert text.startswith(f"some/checkpoint: its config.json has model_type {model_type!r}")
    assert "\n" not in text
    for part in ("Qwen2-VL (qwen2_vl)", "Qwen2.5-VL (qwen2_5_vl)", "Qwen3-VL (qwen3_vl)", "Choose a checkpoint"):
        assert part in text
