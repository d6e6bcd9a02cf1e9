"""Patches made on the device are those of transformers' image processors, to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.packing import pack
from qwen_vl_classifier.backbone.pixels import PatchMaker, Pictures
from qwen_vl_classifier.data.example import Example

CPU = torch.device("cpu")

SETTINGS: dict[str, dict[str, Any]] = {
    "patches of 14, as Qwen2.5-VL": {},
    "patches of 16, as Qwen3-VL": {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "unlike channels": {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 1.0, 3.0]},
    "not rescaled": {"do_rescale": False},
    "not normalised": {"do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5},
    "three frames": {"temporal_patch_size": 3},
    "nine patches a token": {"merge_size": 3},
}


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def image_processor(request: pytest.FixtureRequest) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(**request.param)


def test_patches_are_those_of_the_image_processor(image_processor: Qwen2VLImageProcessorPil) -> None:
    make = PatchMaker(image_processor)
    side = make.patch_size * make.merge_size
    pictures = [noise(7 * rows + columns, rows * side, columns * side) for rows, columns in ((2, 3), (1, 1), (5, 2))]
    expected = image_processor(images=list(map(Image.fromarray, pictures)), do_resize=False, return_tensors="np")
    tensors = list(map(torch.from_numpy, pictures))
    patches = make(tensors, torch.float32)
    assert patches.shape == (len(expected["pixel_values"]), make.patch_dim)
    assert patches.numpy().tobytes() == np.asarray(expected["pixel_values"], dtype=np.float32).tobytes()
    assert torch.equal(make(tensors, torch.bfloat16), patches.bfloat16())
    found = Pictures.of(pictures, make.patch_size)
    assert found.grids == tuple(map(tuple, expected["image_grid_thw"].tolist()))


def test_a_picture_that_does_not_lie_in_one_piece_is_read_right() -> None:
    make = PatchMaker(Qwen2VLImageProcessorPil())
    wide = noise(3, 56, 112)
    half, whole = wide[:, :56], np.ascontiguousarray(wide[:, :56])
    in_parts, in_one = (make([torch.from_numpy(picture)], torch.float32) for picture in (half, whole))
    assert torch.equal(in_parts, in_one)
    assert Pictures.of([half], 14).key == Pictures.of([whole], 14).key


def test_keys_are_those_of_the_content() -> None:
    first, second = noise(1, 56, 84), noise(2, 28, 28)
    together = Pictures.of([first, second], 14)
    joined = Pictures.joined([Pictures.of([first.copy()], 14), Pictures.of([second], 14)])
    assert (joined.key, joined.digests, joined.grids) == (together.key, together.digests, together.grids)
    assert together.nbytes == first.nbytes + second.nbytes
    others = [[second, first], [first], [first, second, second], [first.reshape(84, 56, 3), second]]
    assert len({Pictures.of(pixels, 14).key for pixels in others} | {together.key}) == 5
    assert Pictures.of([first], 14).digests == together.digests[:1]


def test_a_picture_in_several_examples_is_seen_once(tiny_backbone: Backbone) -> None:
    """Also where each example has other pictures beside it."""
    red, blue = (Image.new("RGB", (56, 56), colour) for colour in ("red", "blue"))
    examples = tiny_backbone.prepare([Example((red, blue), "a"), Example((blue, red), "b"), Example(blue, "c")])
    batch = pack(tiny_backbone.processor, examples, ((0,), (1,), (2,)), CPU)
    assert len(batch.grids) == 2
    assert batch.image_order == (0, 1, 1, 0, 1)
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == 2 * math.prod(batch.grids[0])


def test_pictures_are_an_eighth_of_their_patches(tiny_backbone: Backbone) -> None:
    (example,) = tiny_backbone.prepare([Example(Image.new("RGB", (112, 56)), "a")])
    batch = pack(tiny_backbone.processor, [example], ((0,),), CPU)
    assert batch.pixel_values is not None
    assert example.pictures.nbytes * 8 == batch.pixel_values.nbytes
    assert replace(example.pictures, key=b"other").nbytes == example.pictures.nbytes
