"""Draw an explanation: contributions laid over the pictures, a bar for each word, and a scale with its numbers."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, features

from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.images.source import ImageSource

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Colours that most kinds of colour blindness tell apart, and the report's own for the two classes.
_TOWARDS_0 = (29, 95, 180)
_TOWARDS_1 = (194, 65, 12)
_PICTURE_SIDE = 768
_SMALLER_SIDE = 384  # where there are several pictures
_LEGEND_WIDTH = 480
_LEGEND_HEIGHT = 60
_STRONGEST = 0.8  # opacity of the largest contribution: the picture stays visible below it
_GAP = 12

_SHEET_WIDTH = 768
_LINE = 24
_FONT_SIZE = 15
_WORD_WIDTH = 200
_NUMBER_WIDTH = 80
_MOST_CHARACTERS = 100  # of a word that are looked at: more do not fit
_MOST_OF_A_NAME = 14  # characters of the name of a class
_MOST_WORDS = 40  # that get a bar: those that contribute most

# Files by which systems know fonts with many scripts; Pillow looks where each system keeps them.
_FONT_FILES = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansArabic-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "Nirmala.ttf",
)


class Explained(Protocol):
    """What is drawn of an `Explanation`."""

    @property
    def patches(self) -> Sequence[FloatArray]:
        """For each picture, the contributions of its squares: shape (rows, columns)."""

    @property
    def words(self) -> Sequence[tuple[str, float]]:
        """Each word with its contribution."""

    @property
    def caption(self) -> str | None:
        """What the squares explain."""

    @property
    def label_names(self) -> tuple[str, str]:
        """What class 0 and class 1 are called."""


def draw_explanation(images: Sequence[ImageSource], explanation: Explained) -> Image.Image:
    """Draw all of an explanation: its pictures with one scale for all, then its words.

    Orange speaks for class 1, blue for class 0. Pictures turn grey, so that their own colours cannot be taken for
    contributions; one alone is scaled to a longer side of 768 pixels, several to 384.

    A word that no font of this machine can write is drawn as its number in the text, in square brackets, never as
    boxes. Of more than 40 words those that contribute most are drawn; a line says how many are left out.

    Args:
        images: The pictures that were explained, in their order.
        explanation: The `Explanation` of an example with these pictures.

    Returns:
        An RGB picture.

    Raises:
        ImageError: A picture cannot be opened.
    """
    titles = [_title(*named) for named in enumerate(explanation.label_names)]
    limit = max((_largest(grid) for grid in explanation.patches), default=0.0)
    side = _PICTURE_SIDE if len(images) == 1 else _SMALLER_SIDE
    parts = [_overlaid(image, grid, limit, side) for image, grid in zip(images, explanation.patches, strict=True)]
    if parts:
        parts.append(_legend(limit, titles))
        if explanation.caption:
            parts.append(_caption(explanation.caption))
    parts.append(_word_bars(explanation.words, titles))
    return _stacked(parts)


def _largest(contributions: FloatArray) -> float:
    return float(np.abs(contributions).max())


def _overlaid(image: ImageSource, contributions: FloatArray, limit: float, side: int) -> Image.Image:
    picture = open_image(image)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    grey = picture.convert("L").resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = contributions.shape
    # Sharp squares, not a smooth cloud: they show how fine the model's view is.
    squares = contributions[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return _shade(np.asarray(grey, dtype=np.float64), (squares / (limit or 1.0)).clip(-1, 1))


def _shade(grey: FloatArray, strength: FloatArray) -> Image.Image:
    """Colour grey values of 0 to 255 by strengths of -1 (class 0) to 1 (class 1), both of shape (height, width)."""
    opacity = _STRONGEST * np.abs(strength)[..., None]
    colour = np.where(strength[..., None] > 0, _TOWARDS_1, _TOWARDS_0)
    mixed = grey[..., None] * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _title(label: int, name: str) -> tuple[str, Font]:
    """Return how a class is called on the picture, and in which font: by its number where no font has its name."""
    cut = name if len(name) <= _MOST_OF_A_NAME else f"{name[: _MOST_OF_A_NAME - 3]}..."
    written, font = _written(cut)
    return (f"class {label}", font) if written is None or name == str(label) else (written, font)


def _legend(limit: float, titles: Sequence[tuple[str, Font]]) -> Image.Image:
    canvas = Image.new("RGB", (_LEGEND_WIDTH, _LEGEND_HEIGHT), "white")
    bar_width = _LEGEND_WIDTH - 20
    strengths = np.tile(np.linspace(-1, 1, bar_width), (16, 1))
    canvas.paste(_shade(np.full_like(strengths, 255.0), strengths), (10, 10))
    draw = ImageDraw.Draw(canvas)
    (negative, negative_font), (positive, positive_font) = titles
    draw.text((10, 46), f"{negative}  {-limit:.2g}", "black", negative_font, anchor="ls")
    draw.text((10 + bar_width // 2, 46), "log odds", "black", ImageFont.load_default(_FONT_SIZE), anchor="ms")
    draw.text((10 + bar_width, 46), f"{limit:+.2g}  {positive}", "black", positive_font, anchor="rs")
    return canvas


def _caption(text: str) -> Image.Image:
    canvas = Image.new("RGB", (_SHEET_WIDTH, _LINE), "white")
    ImageDraw.Draw(canvas).text((_SHEET_WIDTH // 2, _LINE // 2), text, "black", ImageFont.load_default(14), anchor="mm")
    return canvas


def _word_bars(words: Sequence[tuple[str, float]], titles: Sequence[tuple[str, Font]]) -> Image.Image:
    largest_first = sorted(range(len(words)), key=lambda number: -abs(words[number][1]))
    shown = sorted(largest_first[:_MOST_WORDS])
    left_out = largest_first[_MOST_WORDS:]
    limit = max((abs(value) for _, value in words), default=0.0) or 1.0
    written = [_written(words[number][0]) for number in shown]
    notes = []
    if left_out:
        together = sum(words[number][1] for number in left_out)
        notes.append(f"and {len(left_out)} words that contribute less, together {together:+.3g}")
    if any(text is None for text, _ in written):
        notes.append("[n] is word n of the text, which no font here can write")
    lines = 1 + len(shown) + len(notes)
    canvas = Image.new("RGB", (_SHEET_WIDTH, lines * _LINE + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    axis = (_WORD_WIDTH + _SHEET_WIDTH - _NUMBER_WIDTH) // 2
    reach = axis - _WORD_WIDTH - _GAP
    (negative, negative_font), (positive, positive_font) = titles
    draw.text((axis - 6, 18), f"towards {negative}", _TOWARDS_0, negative_font, anchor="rs")
    draw.text((axis + 6, 18), f"towards {positive}", _TOWARDS_1, positive_font, anchor="ls")
    draw.text((_SHEET_WIDTH - _GAP, 18), "log odds", "black", font, anchor="rs")
    for line, (number, (text, face)) in enumerate(zip(shown, written, strict=True), start=1):
        value = words[number][1]
        top = line * _LINE
        draw.text((_WORD_WIDTH, top + 18), text or f"[{number + 1}]", "black", face, anchor="rs")
        length = round(reach * abs(value) / limit)
        left, right = (axis, axis + length) if value > 0 else (axis - length, axis)
        draw.rectangle((left, top + 4, right, top + 20), _TOWARDS_1 if value > 0 else _TOWARDS_0)
        draw.text((_SHEET_WIDTH - _GAP, top + 18), f"{value:+.3g}", "black", font, anchor="rs")
    draw.line((axis, _LINE, axis, (1 + len(shown)) * _LINE), "black")
    for line, note in enumerate(notes, start=1 + len(shown)):
        draw.text((_SHEET_WIDTH - _GAP, line * _LINE + 18), note, "black", font, anchor="rs")
    return canvas


def _written(word: str) -> tuple[str | None, Font]:
    """Return how a word is written, cut to fit its column, and in which font; `None` where no font can write it."""
    for font in _fonts():
        if _can_write(font, word[:_MOST_CHARACTERS]):
            written = word if len(word) <= _MOST_CHARACTERS else word[:_MOST_CHARACTERS] + "..."
            while font.getlength(written) > _WORD_WIDTH - _GAP:
                written = written.removesuffix("...")[:-1] + "..."
            return written, font
    return None, ImageFont.load_default(_FONT_SIZE)


@functools.cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    """Return the fonts there are, Pillow's own Latin one first where it can be scaled."""
    found = []
    own = ImageFont.load_default(_FONT_SIZE)
    if isinstance(own, ImageFont.FreeTypeFont):
        found.append(own)
    for file in _FONT_FILES:
        try:
            found.append(ImageFont.truetype(file, _FONT_SIZE))
        except OSError:
            continue
    return tuple(found)


def _can_write(font: ImageFont.FreeTypeFont, word: str) -> bool:
    # Joined letters, marks and writing from the right need a layout engine.
    needs_layout = any(
        unicodedata.bidirectional(character) in ("R", "AL", "AN") or unicodedata.category(character)[0] == "M"
        for character in word
    )
    if needs_layout and not features.check("raqm"):
        return False
    return word.isprintable() and all(_has_glyph(font, character) for character in set(word))


@functools.lru_cache(maxsize=4096)
def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Tell whether a font has a character of its own: the one it lacks looks like a code point that never is one."""
    lacking = font.getmask("\uffff", mode="L")
    drawn = font.getmask(character, mode="L")
    return (drawn.size, bytes(drawn)) != (lacking.size, bytes(lacking))


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Put pictures on white, one below the other, each in the middle."""
    width = max(part.width for part in parts)
    canvas = Image.new("RGB", (width, sum(part.height for part in parts) + _GAP * (len(parts) - 1)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, ((width - part.width) // 2, top))
        top += part.height + _GAP
    return canvas
