"""Explain one answer: which squares of the picture and which words moved the probability.

What moves is the log odds, log(p / (1 - p)), since contributions to it add up. A classifier whose tap averages over
tokens is taken apart where they are averaged, by class activation mapping (Zhou et al., 2016, arXiv:1512.04150,
section 2). A tap that reads the text or the last token alone would leave the picture out, although attention has
carried it there; for these the gradient goes back through the network, times its input (Shrikumar et al., 2016,
arXiv:1605.01713, section 3).

Neither says what the classifier would have answered without a square or a word: the hidden state of one token also
holds what attention brought from the tokens before it.
"""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qwen_vl_classifier.backbone.encoder import (
    PackedBatch,
    hidden_states,
    memory_advice,
    pack,
    pooled_states,
)
from qwen_vl_classifier.backbone.taps import pooling_weights
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.data.example import Example, ImageSource
from qwen_vl_classifier.data.images import open_image

FloatArray = npt.NDArray[np.float64]

ACTIVATION_MAPPING = "class activation mapping"
GRADIENT_INPUT = "gradient x input"

# Colours that most kinds of colour blindness tell apart, and the report's own for the two classes.
_TOWARDS_0 = (29, 95, 180)
_TOWARDS_1 = (194, 65, 12)
_PICTURE_SIDE = 768
_LEGEND_WIDTH = 320
_LEGEND_HEIGHT = 60
_STRONGEST = 0.8  # opacity of the largest contribution: the picture stays visible below it


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """What moved one probability. All contributions are in log odds: positive ones speak for class 1.

    Attributes:
        probability: Calibrated probability of class 1.
        log_odds: Its log odds, before the isotonic curve where there is one: the sum of all that follows.
        patches: For each picture, the contributions of its image tokens: shape (rows, columns). A token is a square
            of the picture as it was resized, `merge_size` x `merge_size` patches large.
        words: Each word of the text with its contribution, in the order of the text.
        template: Contribution of the prompt's tokens around pictures and text.
        rest: What no token accounts for: the head's bias and, unless `exact`, what a first-order view leaves out.
        method: "class activation mapping" or "gradient x input".
        exact: Whether contributions and the head's bias alone make up the log odds, as they do for a linear head
            on averaged tokens.
    """

    probability: float
    log_odds: float
    patches: list[FloatArray]
    words: list[tuple[str, float]]
    template: float
    rest: float
    method: str
    exact: bool

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON can hold."""
        return {
            "probability": self.probability,
            "log_odds": self.log_odds,
            "method": self.method,
            "exact": self.exact,
            "words": [{"word": word, "contribution": value} for word, value in self.words],
            "patches": [grid.tolist() for grid in self.patches],
            "template": self.template,
            "rest": self.rest,
        }


def explain(classifier: Classifier, example: Example) -> Explanation:
    """Explain a classifier's answer for one example.

    Args:
        classifier: Whose answer.
        example: What it is asked; a label is not looked at.

    Raises:
        ImageError: A picture cannot be opened.
        OutOfMemoryError: The pass, which keeps activations for a gradient, does not fit.
    """
    backbone = classifier.backbone
    processor = backbone.processor
    (encoded,) = backbone.prepare([example])
    packed = pack(
        [encoded],
        ((0,),),
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
        merge_size=processor.merge_size,
        device=backbone.device,
    )
    averaged = classifier.tap.pooling in ("mean", "image")
    take_apart = _at_the_tap if averaged else _at_the_input
    # A caller may be in inference mode, whose tensors know no gradients.
    with memory_advice("explaining an example"), torch.inference_mode(False), torch.enable_grad():
        feature, log_odds, tokens = take_apart(classifier, packed)

    (spans,) = packed.spans[0]
    start, end = spans.text
    offsets = processor.tokenizer(
        example.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    assert offsets["input_ids"] == encoded.ids[start:end], "the text is tokenised as the processor does it"
    patches = [
        tokens[first:last].reshape(height // processor.merge_size, width // processor.merge_size)
        for (first, last), (_, height, width) in zip(spans.image, encoded.pictures.grids, strict=True)
    ]
    spoken = float(tokens[start:end].sum())
    template = float(tokens.sum() - spoken - sum(grid.sum() for grid in patches))
    return Explanation(
        probability=float(classifier.probabilities_of(feature[None])[0, 1]),
        log_odds=log_odds,
        patches=patches,
        words=join_words(example.text, offsets["offset_mapping"], tokens[start:end].tolist()),
        template=template,
        rest=log_odds - float(tokens.sum()),
        method=ACTIVATION_MAPPING if averaged else GRADIENT_INPUT,
        exact=averaged and classifier.spec.kind == "linear",
    )


def join_words(
    text: str, offsets: Sequence[tuple[int, int]], contributions: Sequence[float]
) -> list[tuple[str, float]]:
    """Join the tokens of a text to words and add up their contributions.

    Words are runs of letters and digits, or of punctuation, between spaces; in scripts without spaces, single
    characters. Words that share a token become one. A token of spaces alone counts with the word after it.

    Args:
        text: The text.
        offsets: For each token, the half-open range of its characters.
        contributions: One number for each token.

    Returns:
        Words in the order of the text; text without any word in it is one word, if it has tokens at all.

    Example:
        >>> join_words("a redcar.", [(0, 1), (1, 5), (5, 8), (8, 9)], [1.0, 2.0, 3.0, 4.0])
        [('a', 1.0), ('redcar', 5.0), ('.', 4.0)]
    """
    pieces = _pieces(text)
    if not pieces:
        return [(text, float(sum(contributions)))] if contributions else []
    ends = [end for _, end in pieces]
    totals = [0.0] * len(pieces)
    joined = [False] * len(pieces)  # with the piece before
    for (start, end), contribution in zip(offsets, contributions, strict=True):
        piece = min(bisect.bisect_right(ends, start), len(pieces) - 1)  # the first that ends after the token begins
        totals[piece] += contribution
        while piece + 1 < len(pieces) and pieces[piece + 1][0] < end:
            piece += 1
            joined[piece] = True
    words: list[tuple[str, float]] = []
    start = 0
    for (first, end), glued, total in zip(pieces, joined, totals, strict=True):
        if glued:
            words[-1] = (text[start:end], words[-1][1] + total)
        else:
            start = first
            words.append((text[first:end], total))
    return words


def heat_map(image: ImageSource, contributions: npt.NDArray[np.floating[Any]]) -> Image.Image:
    """Lay contributions over a picture: orange speaks for class 1, blue for class 0, with a scale below.

    The picture turns grey, so that its own colours cannot be taken for contributions, and is scaled to a longer side
    of 768 pixels.

    Args:
        image: The picture.
        contributions: Shape (rows, columns), such as an entry of `Explanation.patches`.

    Returns:
        An RGB picture.

    Raises:
        ImageError: The picture cannot be opened.
    """
    picture = open_image(image)
    scale = _PICTURE_SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    grey = picture.convert("L").resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = contributions.shape
    limit = float(np.abs(contributions).max())
    # Sharp squares, not a smooth cloud: they show how fine the model's view is.
    squares = contributions[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    shaded = _shade(np.asarray(grey, dtype=np.float64), squares / (limit or 1.0))

    canvas = Image.new("RGB", (max(width, _LEGEND_WIDTH), height + _LEGEND_HEIGHT), "white")
    canvas.paste(shaded, ((canvas.width - width) // 2, 0))
    _draw_legend(canvas, height, limit)
    return canvas


def _at_the_tap(classifier: Classifier, packed: PackedBatch) -> tuple[npt.NDArray[np.float32], float, FloatArray]:
    """Take the log odds apart where tokens are averaged: gradient of the head . (weight x hidden state).

    Returns:
        The feature, shape (hidden,); the log odds; and the contribution of each token, shape (tokens,).
    """
    tap = classifier.tap
    with torch.no_grad():
        ((_, hidden),) = hidden_states(classifier.backbone.model, packed, {tap.layer})
    states = hidden[0].float().cpu()
    weights = torch.from_numpy(pooling_weights(packed.spans[0], tap.pooling, len(states)))[0]
    feature = (weights @ states).requires_grad_()
    log_odds = _log_odds(classifier, feature)
    (gradient,) = torch.autograd.grad(log_odds, feature)
    contributions = weights.double() * (states.double() @ gradient.double())
    return feature.detach().numpy(), log_odds.item(), contributions.numpy()


def _at_the_input(classifier: Classifier, packed: PackedBatch) -> tuple[npt.NDArray[np.float32], float, FloatArray]:
    """Take the log odds apart where tokens enter the decoder; returns what `_at_the_tap` does."""
    model = classifier.backbone.model
    with _recorded_entries(model.language_model.layers) as entries:  # type: ignore[union-attr]
        feature = pooled_states(model, packed, [classifier.tap])[0, 0].cpu()
    log_odds = _log_odds(classifier, feature)
    gradients = torch.autograd.grad(log_odds, [stream for stream, _ in entries])
    contributions = torch.zeros(packed.input_ids.shape[1], dtype=torch.float64)
    for gradient, (_, entered) in zip(gradients, entries, strict=True):
        contributions += (gradient.double() * entered.double()).sum(-1)[0].cpu()
    return feature.detach().numpy(), log_odds.item(), contributions.numpy()


def _log_odds(classifier: Classifier, feature: Tensor) -> Tensor:
    logits: Tensor = classifier.head(feature[None])[0]
    return (logits[1] - logits[0]) / classifier.temperature


@contextmanager
def _recorded_entries(layers: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what enters the decoder from outside, and let gradients flow back to there.

    Embeddings enter before the first layer; Qwen3-VL adds picture features between later layers too, which shows
    in that a layer's input is not the output of the one before.

    Yields:
        A list that fills up during a pass: the input of a layer, which has a gradient, and the part of it that
        entered there, both of shape (rows, tokens, hidden).
    """
    entries: list[tuple[Tensor, Tensor]] = []
    last_output: list[Tensor] = []

    def before(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0]
        if not last_output:
            hidden = hidden.detach().requires_grad_()
            entries.append((hidden, hidden.detach()))
            return (hidden, *arguments[1:])
        if hidden is not last_output[0]:
            entries.append((hidden, (hidden - last_output[0]).detach()))
        return None

    def after(_: Any, __: tuple[Any, ...], output: Tensor) -> None:
        last_output[:] = [output]

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield entries
    finally:
        for hook in hooks:
            hook.remove()


def _pieces(text: str) -> list[tuple[int, int]]:
    """Cut a text into runs of one kind of character; spaces are left out."""
    pieces = []
    for kind, run in itertools.groupby(enumerate(text), key=lambda item: _kind(item[1])):
        indices = [index for index, _ in run]
        if kind == "alone":
            pieces += [(index, index + 1) for index in indices]
        elif kind != "space":
            pieces.append((indices[0], indices[-1] + 1))
    return pieces


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    # Marks are letters too: many scripts, and decomposed accents, write vowels with them.
    if unicodedata.category(character)[0] in "PS" and character not in "'’":
        return "punctuation"
    hangul = "\uac00" <= character <= "\ud7a3"  # as wide as other East Asian script, but written with spaces
    return "alone" if unicodedata.east_asian_width(character) == "W" and not hangul else "letter"


def _shade(grey: FloatArray, strength: FloatArray) -> Image.Image:
    """Colour grey values of 0 to 255 by strengths of -1 (class 0) to 1 (class 1), both of shape (height, width)."""
    opacity = _STRONGEST * np.abs(strength)[..., None]
    colour = np.where(strength[..., None] > 0, _TOWARDS_1, _TOWARDS_0)
    mixed = grey[..., None] * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _draw_legend(canvas: Image.Image, top: int, limit: float) -> None:
    bar_width = _LEGEND_WIDTH - 20
    left = (canvas.width - bar_width) // 2
    strengths = np.tile(np.linspace(-1, 1, bar_width), (16, 1))
    canvas.paste(_shade(np.full_like(strengths, 255.0), strengths), (left, top + 10))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    line = top + 32
    draw.text((left, line), f"class 0  {-limit:.2g}", "black", font, anchor="la")
    draw.text((left + bar_width // 2, line), "log odds", "black", font, anchor="ma")
    draw.text((left + bar_width, line), f"{limit:+.2g}  class 1", "black", font, anchor="ra")
