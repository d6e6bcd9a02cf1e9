"""Pictures changed at random while training, so that a model learns what they show and not how they were taken.

What is warped, recoloured and blurred is by kornia's functions, which need no torchvision. What is drawn at random is
drawn here, from a stream of its own: kornia's augmentation classes draw from the one global generator of torch, which
also decides on dropout, and which a thread that reads ahead would disturb.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen_vl_classifier.config.finetune import AUGMENTATIONS
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.images.opening import open_image


@dataclass(frozen=True, slots=True)
class _Ranges:
    """How far a level goes. Draws are uniform, unless said otherwise.

    Attributes:
        area: Least share of the picture that a crop keeps.
        stretch: Greatest factor by which the aspect ratio changes, either way; drawn on a log scale.
        rotation: Greatest angle in degrees, either way, of a square picture.
        shift: Greatest way of a corner in perspective, as a share of the crop's side.
        light: Greatest change of brightness and of contrast, each, as a share.
        saturation: Greatest change of saturation, as a share.
        hue: Greatest turn of hue in degrees, either way.
        blur: Greatest standard deviation of a Gaussian blur, in pixels of a picture with a shorter side of 224.
        noise: Greatest standard deviation of Gaussian noise, as a share of the full range.
        quality: Least and greatest quality of JPEG; (0, 0) for none.
        chance: Chance of hue, blur, noise and JPEG, each.
    """

    area: float
    stretch: float
    rotation: float
    shift: float
    light: float
    saturation: float
    hue: float
    blur: float
    noise: float
    quality: tuple[int, int]
    chance: float


_RANGES = {
    "light": _Ranges(
        area=0.85,
        stretch=1.05,
        rotation=0,
        shift=0,
        light=0.1,
        saturation=0.1,
        hue=0,
        blur=0.6,
        noise=0,
        quality=(0, 0),
        chance=0.25,
    ),
    "strong": _Ranges(
        area=0.6,
        stretch=1.15,
        rotation=10,
        shift=0.05,
        light=0.2,
        saturation=0.3,
        hue=6,
        blur=1.2,
        noise=0.04,
        quality=(40, 90),
        chance=0.3,
    ),
}

_CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """A way to change pictures at random; kornia is needed for every level but "none".

    A crop cuts off what lies at the edge, and colours move a little: where the label hangs on a small thing at the
    edge, on a count or on a fine difference of colour, take "light" or "none". The page that
    `write_augmentation_page` makes shows what a level does to the pictures at hand.

    Attributes:
        level: One of `AUGMENTATIONS`.
        flips: Whether half of the pictures are mirrored left to right. Off by default, since labels may depend on
            left and right.

    Raises:
        ConfigError: If the level is none of these.
        MissingExtraError: If kornia is needed and not installed.

    Example:
        >>> picture = Image.new("RGB", (64, 48), "teal")
        >>> Augmentation("strong")(picture, (3, 1)) == Augmentation("strong")(picture, (3, 1))
        True
    """

    level: str
    flips: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.level not in AUGMENTATIONS:
            raise ConfigError(
                f"augmentation is {self.level!r}; expected one of {', '.join(AUGMENTATIONS)}; choose one of these"
            )
        if self.level != "none":
            require("kornia", extra="finetune")  # says so now, not at the first batch

    def __call__(self, picture: Image.Image, seed: int | Sequence[int]) -> Image.Image:
        """Return the picture changed, of the same size; at level "none" the very same picture.

        Args:
            picture: An RGB picture, as `open_image` gives it.
            seed: One or several integers, such as (seed, epoch, row). They alone decide what is done: the same seed
                gives the same pixels in any process, and no other random state is read or changed.
        """
        if self.level == "none":
            return picture
        import torch

        ranges, rng = _RANGES[self.level], _stream(seed)
        source = _sample_corners(picture.size, ranges, rng)
        mirrored = rng.random() < 0.5 and self.flips
        values = np.array(picture)
        with torch.no_grad():
            pixels = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255
            pixels = _warp(pixels, source, _CORNERS * (-1, 1) if mirrored else _CORNERS)
            pixels = _recolour(pixels, float(values.mean()) / 255, ranges, rng)
            pixels = _soften(pixels, ranges, rng)
            pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
            changed = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
        if ranges.quality[1] and rng.random() < ranges.chance:
            return _compress(changed, int(rng.integers(*ranges.quality, endpoint=True)))
        return changed

    @property
    def operations(self) -> tuple[str, ...]:
        """What is done to a picture, one phrase for each operation, in their order, with its range."""
        if self.level == "none":
            return ()
        ranges = _RANGES[self.level]
        often = f"in {ranges.chance:.0%} of the pictures"
        phrases = (
            (ranges.area < 1, f"crop to {ranges.area:.0%} to 100% of the area, resized back"),
            (ranges.stretch > 1, f"aspect ratio changed by a factor of up to {ranges.stretch:g}"),
            (
                ranges.rotation > 0,
                f"rotation by up to {ranges.rotation:g}° either way (less for long pictures; "
                "where an edge falls short, it is mirrored)",
            ),
            (ranges.shift > 0, f"perspective that moves each corner by up to {ranges.shift:.0%} of the side"),
            (self.flips, "mirrored left to right in half of the pictures"),
            (ranges.light > 0, f"brightness and contrast by up to ±{ranges.light:.0%} each"),
            (ranges.saturation > 0, f"saturation by up to ±{ranges.saturation:.0%}"),
            (ranges.hue > 0, f"hue turned by up to ±{ranges.hue:g}° {often}"),
            (
                ranges.blur > 0,
                f"Gaussian blur with a standard deviation of up to {ranges.blur:g}/224 of the shorter side {often}",
            ),
            (
                ranges.noise > 0,
                f"grey Gaussian noise with a standard deviation of up to {ranges.noise:.0%} of the range {often}",
            ),
            (ranges.quality[1] > 0, f"JPEG of quality {ranges.quality[0]} to {ranges.quality[1]} {often}"),
        )
        return tuple(phrase for used, phrase in phrases if used)


def augment_example(example: Example, augmentation: Augmentation, seed: int | Sequence[int]) -> Example:
    """Return the example with its pictures opened and changed, all else as it was.

    Several pictures of one example are changed each in its own way. At level "none" the example itself is returned.

    Args:
        example: An example, with any number of pictures.
        augmentation: What to do to them.
        seed: One or several integers that decide what is drawn; see `Augmentation`.

    Raises:
        ImageError: A picture cannot be opened.
    """
    if augmentation.level == "none" or not example.images:
        return example
    stem = _integers(seed)
    pictures = [augmentation(open_image(source), (*stem, index)) for index, source in enumerate(example.images)]
    several = isinstance(example.image, (list, tuple))
    return replace(example, image=tuple(pictures) if several else pictures[0])


def _integers(seed: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(part) for part in seed) if isinstance(seed, Sequence) else (int(seed),)


def _stream(seed: int | Sequence[int]) -> np.random.Generator:
    """Start a stream that no other seed starts; numpy's own seeding takes (1,) and (1, 0) for the same."""
    digest = hashlib.sha256(repr(_integers(seed)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _sample_corners(size: tuple[int, int], ranges: _Ranges, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw which part of the picture is shown, by its corners.

    Returns:
        (4, 2), x and y of the corners in the order of `_CORNERS`, from -1 to 1 across the picture and a little
        beyond where a rotated part does not fit.
    """
    sides = np.array(size, dtype=np.float64)
    area = rng.uniform(ranges.area, 1)
    stretch = np.exp(rng.uniform(-1, 1) * np.log(ranges.stretch))
    width = np.clip(np.sqrt(area * stretch), area, 1)  # so that the height, a share too, is at most 1
    corners = _CORNERS * (width, area / width) * sides / 2
    corners += rng.uniform(-ranges.shift, ranges.shift, (4, 2)) * np.ptp(corners, axis=0)
    # Divided by the aspect ratio, the turn moves the ends of a long picture by no more than those of a square.
    angle = np.radians(rng.uniform(-ranges.rotation, ranges.rotation)) * sides.min() / sides.max()
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    corners = corners @ turn
    room = np.maximum(sides / 2 - np.abs(corners).max(axis=0), 0)
    shown: npt.NDArray[np.float64] = (corners + rng.uniform(-1, 1, 2) * room) / (sides / 2)
    return shown


def _warp(pixels: Any, source: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> Any:
    """Bring the corners `source` of (1, 3, height, width) pixels to the corners `target`, by one interpolation."""
    import torch

    geometry = require("kornia.geometry.transform", extra="finetune")
    homography = geometry.get_perspective_transform(torch.from_numpy(target)[None], torch.from_numpy(source)[None])
    return geometry.homography_warp(
        pixels,
        homography.float(),
        tuple(pixels.shape[-2:]),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=True,
    )


def _recolour(pixels: Any, mean: float, ranges: _Ranges, rng: np.random.Generator) -> Any:
    """Change brightness, contrast about the picture's mean, saturation and hue; what is grey stays grey."""
    enhance = require("kornia.enhance", extra="finetune")
    brightness, contrast = 1 + rng.uniform(-ranges.light, ranges.light, 2)
    # The mean is that of the bytes, which is exact: a sum of floats depends on the number of threads.
    pixels = ((pixels * contrast + mean * (1 - contrast)) * brightness).clamp(0, 1)
    saturation = 1 + rng.uniform(-ranges.saturation, ranges.saturation)
    pixels = enhance.adjust_saturation_with_gray_subtraction(pixels, float(saturation))
    if ranges.hue and rng.random() < ranges.chance:
        pixels = enhance.adjust_hue(pixels, float(np.radians(rng.uniform(-ranges.hue, ranges.hue))))
    return pixels


def _soften(pixels: Any, ranges: _Ranges, rng: np.random.Generator) -> Any:
    """Blur, and add noise that is the same in all three channels, so that grey stays grey."""
    import torch

    if ranges.blur and rng.random() < ranges.chance:
        sigma = float(rng.uniform(0.1, ranges.blur)) * min(pixels.shape[-2:]) / 224
        reach = 2 * max(1, round(3 * sigma)) + 1
        filters = require("kornia.filters", extra="finetune")
        pixels = filters.gaussian_blur2d(pixels, (reach, reach), (sigma, sigma), border_type="replicate")
    if ranges.noise and rng.random() < ranges.chance:
        noise = rng.standard_normal(tuple(pixels.shape[-2:]), dtype=np.float32)
        pixels = pixels + torch.from_numpy(noise) * float(rng.uniform(0, ranges.noise))
    return pixels


def _compress(picture: Image.Image, quality: int) -> Image.Image:
    """Compress as JPEG by Pillow: kornia's own, made for gradients, takes ten times as long."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer, formats=("JPEG",)).convert("RGB")
