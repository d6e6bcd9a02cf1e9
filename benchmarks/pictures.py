"""Examples for the encoder's benchmark: pictures that look like photos to a decoder, and texts of a given length."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN

_OCTAVES = (4, 16, 64)  # sides of the noise that is laid over itself, in samples


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Draw smooth noise with fine noise over it, as a JPEG file of a photo's size."""
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for side in _OCTAVES:
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = pixels / len(_OCTAVES) + rng.normal(0, 4, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def words() -> tuple[str, ...]:
    """Return words that the built-in tokeniser reads as one token each, with the space before them."""
    content = json.loads((BUILTIN["builtin:tiny"] / "tokenizer.json").read_text(encoding="utf-8"))
    return tuple(sorted(word[1:] for word in content["model"]["vocab"] if word[0] == "\u0120" and word[1:].isalpha()))


def text(rng: np.random.Generator, tokens: int) -> str:
    """Write a text of so many tokens, give or take a few at word boundaries."""
    return "".join(f" {word}" for word in rng.choice(words(), tokens))


def examples(
    count: int, sizes: Sequence[tuple[int, int]], tokens: Sequence[int], *, texts_each: int = 1, seed: int = 0
) -> list[Example]:
    """Make labelled examples, each picture with one or several texts, in no order of length.

    Args:
        count: How many pictures.
        sizes: Widths and heights to take in turn.
        tokens: Shortest and longest text, in tokens.
        texts_each: How many texts come with each picture.
        seed: Of pictures and texts.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        picture = photo(rng, *sizes[number % len(sizes)])
        for _ in range(texts_each):
            length = int(rng.integers(tokens[0], tokens[1] + 1))
            made.append(Example(picture, text(rng, length), len(made) % 2))
    return made


def texts(count: int, tokens: int, seed: int = 0) -> list[Example]:
    """Make examples without pictures, of equal length."""
    rng = np.random.default_rng(seed)
    return [Example(None, text(rng, tokens)) for _ in range(count)]
