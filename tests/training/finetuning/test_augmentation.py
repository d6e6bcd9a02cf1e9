"""Augmentation: decided by its seed alone, true to what a picture shows, and silent about everything else."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError, ImageError, MissingExtraError
from qwen_vl_classifier.training.finetuning.augmentation import AUGMENTATIONS, Augmentation, augment_example

LEVELS = AUGMENTATIONS[1:]


def mosaic(width: int, height: int, channels: int = 3) -> Image.Image:
    """Return a picture of smooth random colours, or greys."""
    tiles = np.random.default_rng(width * height).integers(0, 256, (7, 9, channels), dtype=np.uint8)
    tiles = np.broadcast_to(tiles, (7, 9, 3)).copy()
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


def digest() -> str:
    """Name the pixels of many draws, among them all operations."""
    total = hashlib.sha256()
    for level, draws in (("light", 3), ("strong", 9)):
        for seed in range(draws):
            total.update(Augmentation(level)(mosaic(90, 230), (5, seed)).tobytes())
    return total.hexdigest()


def test_a_fresh_process_draws_the_same_pixels_in_any_number_of_threads():
    script = (
        "import sys\n"
        "import qwen_vl_classifier.training.finetuning.augmentation\n"
        "assert not {'torch', 'kornia'} & set(sys.modules), 'importing the module is not cheap'\n"
        "from test_augmentation import digest\n"
        "print(digest())\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    threads = "2" if torch.get_num_threads() == 1 else "1"
    folders = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[3]))
    seen = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == digest()


@pytest.mark.parametrize("level", LEVELS)
def test_random_state_is_neither_read_nor_changed(level):
    def states() -> tuple:
        name, keys, *rest = np.random.get_state()
        return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()

    drawn = set()
    for outside in (1, 2):
        random.seed(outside)
        np.random.seed(outside)
        torch.manual_seed(outside)
        before = states()
        drawn.add(b"".join(Augmentation(level)(mosaic(60, 60), seed).tobytes() for seed in range(12)))
        assert states() == before
    assert len(drawn) == 1


def test_every_seed_draws_its_own():
    seeds = [0, 1, (1, 0), (0, 1), (1, 0, 0), 2**32, -1, (2**64, 7)]
    assert len({Augmentation("strong")(mosaic(60, 60), seed).tobytes() for seed in seeds}) == len(seeds)
    again, whole = (Augmentation("light")(mosaic(60, 60), seed) for seed in ((3,), np.int64(3)))
    assert again.tobytes() == whole.tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (28, 28), (301, 187), (400, 2)])
def test_the_size_stays_and_the_picture_handed_in_too(level, size):
    picture = mosaic(*size)
    before = picture.tobytes()
    for seed in range(12):
        changed = Augmentation(level)(picture, seed)
        assert (changed.size, changed.mode) == (size, "RGB")
    assert picture.tobytes() == before


def test_a_large_picture_works():
    assert Augmentation("strong")(mosaic(2000, 2000), 0).size == (2000, 2000)


def left_is_darker(picture: Image.Image) -> bool:
    values = np.asarray(picture.convert("L"), dtype=float)
    return values[:, :16].mean() < values[:, -16:].mean()


def test_left_stays_left_unless_flips_are_asked_for():
    picture = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8), 24, 1).repeat(48, 0))
    assert left_is_darker(picture)
    assert all(left_is_darker(Augmentation("strong")(picture, seed)) for seed in range(200))
    flipped = [not left_is_darker(Augmentation("light", flips=True)(picture, seed)) for seed in range(200)]
    assert 0.4 < np.mean(flipped) < 0.6


def test_what_is_upright_stays_upright():
    picture = Image.fromarray(np.repeat(np.array([[[0] * 3], [[255] * 3]], dtype=np.uint8), 24, 0).repeat(48, 1))
    for seed in range(100):
        values = np.asarray(Augmentation("strong", flips=True)(picture, seed), dtype=float)
        assert values[:16].mean() < values[-16:].mean()


@pytest.mark.parametrize("level", LEVELS)
def test_grey_stays_grey(level):
    picture = mosaic(61, 47, channels=1)
    for seed in range(100):
        values = np.asarray(Augmentation(level)(picture, seed))
        assert (values == values[..., :1]).all()


@pytest.mark.parametrize(("level", "least", "most"), [("light", 0.55, 0.61), ("strong", 0.7, 0.95)])
def test_a_crop_keeps_its_share_of_the_area(level, least, most):
    square = np.full((100, 100, 3), 255, dtype=np.uint8)
    square[15:85, 15:85] = 0  # 49 % of the area: of a crop to the share a, 0.49 / a
    shares = []
    for seed in range(100):
        values = np.asarray(Augmentation(level)(Image.fromarray(square), seed).convert("L"), dtype=float)
        shares.append((values < (values.min() + values.max()) / 2).mean())
    assert least < max(shares) < most


def test_light_stays_nearer_to_the_picture_than_strong():
    picture = mosaic(64, 64)
    drawn = [[np.asarray(Augmentation(level)(picture, seed), dtype=float) for seed in range(40)] for level in LEVELS]
    light, strong = (np.abs(np.stack(level) - np.asarray(picture)).mean() for level in drawn)
    assert 3 < light < 0.75 * strong


def test_none_returns_what_came_in():
    picture = mosaic(20, 30)
    example = Example("missing.jpg", "text")
    assert Augmentation("none", flips=True)(picture, 0) is picture
    assert augment_example(example, Augmentation("none"), 0) is example
    assert Augmentation("none").operations == ()


def test_operations_name_the_level_s_own():
    light, strong = (" ".join(Augmentation(level).operations) for level in LEVELS)
    assert "85% to 100%" in light
    assert "60% to 100%" in strong
    for word in ("rotation", "perspective", "hue", "noise", "JPEG"):
        assert word in strong
        assert word not in light
    assert "mirrored left to right" not in strong
    assert "mirrored left to right" in " ".join(Augmentation("light", flips=True).operations)


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="'medium'; expected one of none, light, strong"):
        Augmentation("medium")


def test_missing_kornia_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(MissingExtraError, match=r"kornia is not installed; .*\[finetune\]"):
        Augmentation("light")
    assert Augmentation("none").level == "none"


def test_an_example_keeps_all_but_its_pixels(tmp_path):
    path, buffer = tmp_path / "a.png", io.BytesIO()
    mosaic(40, 30).save(path)
    mosaic(40, 30).save(buffer, "PNG")
    example = Example([path, buffer.getvalue(), mosaic(40, 30)], "a text", label=1, id="x", fields={"group": 3})
    changed = augment_example(example, Augmentation("strong"), (0, 4))
    assert (changed.text, changed.label, changed.id, changed.fields) == ("a text", 1, "x", {"group": 3})
    assert [picture.size for picture in changed.images] == [(40, 30)] * 3
    assert len({picture.tobytes() for picture in changed.images}) == 3  # the same picture thrice, changed thrice
    again = augment_example(example, Augmentation("strong"), (0, 4))
    assert [one.tobytes() for one in again.images] == [one.tobytes() for one in changed.images]


def test_one_picture_stays_one_and_none_stays_none(tmp_path):
    assert isinstance(augment_example(Example(mosaic(9, 9), "t"), Augmentation("light"), 0).image, Image.Image)
    assert len(augment_example(Example([mosaic(9, 9)], "t"), Augmentation("light"), 0).image) == 1
    text_alone = Example(None, "t")
    assert augment_example(text_alone, Augmentation("light"), 0) is text_alone
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        augment_example(Example(tmp_path / "missing.jpg", "t"), Augmentation("light"), 0)
