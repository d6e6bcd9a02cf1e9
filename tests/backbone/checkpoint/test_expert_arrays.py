"""Arrays of experts in every layout that is in circulation give the same features, also where a shape is square."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.errors import CheckpointError
from tests import nano
from tests.reference import assert_close, by_hand, load_reference

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(3, "text"), Tap(-1, "last")]
EXAMPLES = [Example(Image.new("RGB", (84, 56), "red"), "a text"), Example(None, "no picture")]
FIRST = "model.language_model.layers.0.mlp.experts"

Weights = dict[str, torch.Tensor]


def load(folder: Path, **options: int) -> Backbone:
    return Backbone.load(folder, device="cpu", dtype="float32", **options)


def swapped(weights: Weights) -> Weights:
    """Swap the last two axes of all arrays of experts."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in weights.items()
    }


def single(weights: Weights) -> Weights:
    """Write three matrices for each expert, as transformers saves Qwen3.5-MoE."""
    split: Weights = {}
    for name, tensor in weights.items():
        experts, found, part = name.partition(".experts.")
        for number, matrix in enumerate(tensor if found else []):
            halves = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True) if part == "gate_up_proj" else ()
            for own, values in halves or [(part, matrix)]:
                split[f"{experts}.experts.{number}.{own}.weight"] = values.contiguous()
        if not found:
            split[name] = tensor
    return split


def rewritten(source: Path, folder: Path, change: Callable[[Weights], Weights]) -> Path:
    shutil.copytree(source, folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=nano.EXPERTS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def published(family, tmp_path_factory) -> Path:
    return nano.make_checkpoint(family, tmp_path_factory.mktemp("experts") / family)


@pytest.mark.parametrize("width", [48, 64, 32], ids=["none", "down_proj", "gate_up_proj"])
def test_swapped_axes_are_found_whichever_array_is_square(family, width, tmp_path):
    """One square array does not tell; transformers takes it as it is, and its features are wrong without an error."""
    source = nano.make_checkpoint(family, tmp_path / "source", text_config={"moe_intermediate_size": width})
    other = rewritten(source, tmp_path / "other", swapped)
    features = [load(folder).encode(EXAMPLES, TAPS) for folder in (source, other)]
    np.testing.assert_array_equal(*features)
    as_in_the_model = other if family == "qwen3_vl_moe" else source
    model = load_reference(family, as_in_the_model)
    assert_close(features[0], by_hand(model, load(source).processor, EXAMPLES, TAPS))


def test_matrices_of_single_experts(family, published, tmp_path):
    if family == "qwen3_vl_moe":  # nobody saves it so, and transformers does not join them
        folder = rewritten(published, tmp_path / "single", lambda weights: single(swapped(weights)))
        with pytest.raises(CheckpointError, match=r"missing weight\(s\), first language_model.layers.0.mlp.experts"):
            load(folder)
        return
    folder = rewritten(published, tmp_path / "single", single)
    for options in ({}, {"num_layers": 2}):
        taps = TAPS if not options else [Tap(1, "mean"), Tap(2, "last")]
        features = [load(each, **options).encode(EXAMPLES, taps) for each in (folder, published)]
        np.testing.assert_array_equal(*features)


def test_what_is_written_is_as_published(published, tmp_path):
    backbone = load(published)
    backbone.save(tmp_path / "saved")
    saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", published))
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights | {f"{FIRST}.down_proj": torch.ones(8, 50, 64)}, "shapes differ"),
        (lambda weights: weights | {f"{FIRST}.down_proj": torch.ones(48, 64)}, "shapes differ"),
        (lambda weights: {name: weights[name] for name in weights if name != f"{FIRST}.down_proj"}, "missing weight"),
        (lambda weights: weights | {f"{FIRST}.0.down_proj.weight": torch.ones(64, 48)}, "unexpected weight"),
    ],
    ids=["other width", "two axes", "missing", "both layouts"],
)
def test_damaged_arrays_are_named(published, change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(rewritten(published, tmp_path / "damaged", change))
    assert "layers.0.mlp.experts" in str(caught.value)


@pytest.mark.parametrize("lost", ["0.up_proj", "7.down_proj"])
def test_an_expert_that_is_missing_is_named(tmp_path, lost):
    source = nano.make_checkpoint("qwen3_5_moe", tmp_path / "source")
    key = f"{FIRST}.{lost}.weight"
    folder = rewritten(
        source,
        tmp_path / "damaged",
        lambda weights: {name: part for name, part in single(weights).items() if name != key},
    )
    with pytest.raises(CheckpointError, match="1 missing weight") as caught:
        load(folder)
    assert f"experts.{lost}.weight of shape" in str(caught.value)
