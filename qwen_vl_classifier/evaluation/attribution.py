"""Three ways to measure which tokens moved the log odds of class 1, one number for each token.

- `at_the_tap`: class activation mapping (Zhou et al., 2016, arXiv:1512.04150, section 2): the head's gradient times
  each token's share of the average. For a linear head that is no estimate: the shares and the bias are the log odds.
  But attention is causal and pictures come before the text, so the shares of image tokens are the same whatever the
  text says about the picture.
- `along_the_path`: integrated gradients (Sundararajan et al., 2017, arXiv:1703.01365, section 3) back through the
  decoder, from another picture and no words to what is there. One gradient times the input, without the path, says
  little here: behind the RMSNorm of each layer the size of what enters is gone, and with it that slope.
- `occluded`: cover a square, leave out a word, and score again (Zeiler and Fergus, 2014, arXiv:1311.2901, section 4.1).
  It needs a pass for each, and no gradient: the reference for the others. captum's occlusion slides over input
  tensors of one shape; pictures of any size as packed patches, and words that are several tokens, it does not know.

Each plans its passes before the first, and runs them one at a time. Between two of them others may use the model: then
no hook is on it, and neither the mode of gradients nor anything else of the thread is changed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from qwen_vl_classifier.backbone.devices import memory_advice
from qwen_vl_classifier.backbone.encoder import hidden_states, pooled_states
from qwen_vl_classifier.backbone.packing import PackedBatch, pack
from qwen_vl_classifier.backbone.pixels import Pictures
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import Spans, pooling_weights
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import margins_of
from qwen_vl_classifier.evaluation.interventions import (
    kept_experts,
    recorded_entries,
    recorded_experts,
    replaced_entries,
)

FloatArray: TypeAlias = npt.NDArray[np.float64]

STEPS = 16  # of the path: contributions then add up closely enough; a test compares them with more steps

GRADIENT_COST = 3  # passes that one with its gradient counts as; on a CPU it took 3.4 times as long
_MOST_SQUARES = 144  # that are covered in one picture, one pass each; larger grids are covered in larger squares
_AT_ONCE = 16  # most changed examples in a pass: each has pixels of its own


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """What each token of one example contributes.

    Attributes:
        feature: What the head reads, float32 of shape (hidden,).
        log_odds: Log odds of class 1: after the temperature, before an isotonic curve.
        tokens: Contributions in log odds, shape (tokens,).
        missed: By how much a sum over a path misses the difference that it should add up to.
        keeps_experts: Whether the baseline was given the experts that the example's tokens have.
    """

    feature: npt.NDArray[np.float32]
    log_odds: float
    tokens: FloatArray
    missed: float = 0.0
    keeps_experts: bool = False


class Passes:
    """The passes of an attribution, which others may interrupt between any two.

    Args:
        costs: Of each pass: its tokens, times three where it keeps a gradient.
        steps: Runs them; yields between two, and returns the result after the last.

    Attributes:
        costs: The same.
    """

    def __init__(self, costs: Sequence[int], steps: Generator[None, None, Attribution]) -> None:
        self.costs = costs
        self._steps = steps

    def run_one(self) -> Attribution | None:
        """Run the next pass; return the result after the last."""
        # A caller may be in inference mode, whose tensors know no gradients.
        with memory_advice("explaining an example"), torch.inference_mode(False), torch.enable_grad():
            try:
                next(self._steps)
            except StopIteration as end:
                found: Attribution = end.value
                return found
        return None

    def run(self) -> Attribution:
        """Run all passes that are left."""
        while (found := self.run_one()) is None:
            pass
        return found


def at_the_tap(classifier: Classifier, encoded: EncodedExample) -> Passes:
    """Split the log odds at the tap, where tokens are averaged: gradient of the head . (weight x hidden state).

    A token outside the tap's average contributes nothing.
    """
    return Passes([len(encoded.ids)], _at_the_tap(classifier, encoded))


def _at_the_tap(classifier: Classifier, encoded: EncodedExample) -> Generator[None, None, Attribution]:
    yield from ()  # it is one pass
    tap = classifier.tap
    packed = _packed(classifier, encoded)
    with torch.no_grad():
        ((_, hidden),) = hidden_states(classifier.backbone.model, packed, {tap.depth})
    states = hidden[0].float().cpu()
    weights = torch.from_numpy(pooling_weights(packed.spans[0], tap.pooling, len(states)))[0]
    feature = (weights @ states).requires_grad_()
    log_odds = _log_odds(classifier, feature)
    (gradient,) = torch.autograd.grad(log_odds, feature)
    contributions = weights.double() * (states.double() @ gradient.double())
    return Attribution(feature.detach().numpy(), log_odds.item(), contributions.numpy())


def along_the_path(
    classifier: Classifier, encoded: EncodedExample, baseline: Pictures, *, steps: int = STEPS
) -> Passes:
    """Integrate gradients along the straight line from other pictures and no words, where tokens enter the decoder.

    The other pictures go through the vision tower; no words are as many padding tokens. Contributions add up to the
    difference of the log odds between both ends of the line, as far as the steps go. In layers with experts each token
    keeps those that it has in the example: where another expert takes its place, the answer jumps, and gradients do
    not see that.

    Args:
        classifier: Whose answer.
        encoded: The example.
        baseline: Pictures of the same shapes, where the line begins: `empty_pictures` or `average_pictures`.
        steps: On the line.
    """
    tokens = len(encoded.ids)
    costs = [tokens] * 3 + [GRADIENT_COST * tokens] * steps
    return Passes(costs, _along_the_path(classifier, encoded, baseline, steps))


def _along_the_path(
    classifier: Classifier, encoded: EncodedExample, baseline: Pictures, steps: int
) -> Generator[None, None, Attribution]:
    model: Any = classifier.backbone.model
    packed = _packed(classifier, encoded)
    without = replace(encoded, pictures=baseline)
    layers = model.language_model.layers
    with torch.no_grad():
        with recorded_entries(layers) as there, recorded_experts(layers) as experts:
            read = pooled_states(model, packed, [classifier.tap])[0, 0].cpu()
        log_odds = _log_odds(classifier, read).item()
    yield
    with torch.no_grad():
        with recorded_entries(layers) as origin:
            pooled_states(model, _packed(classifier, without), [classifier.tap])
        start, end = encoded.spans.text
        padding = torch.tensor([classifier.backbone.processor.pad_token_id], device=packed.input_ids.device)
        nothing = origin[0].clone()
        nothing[0, start:end] = model.language_model.embed_tokens(padding)
        origin[0] = nothing
        way = {number: there[number] - origin[number] for number in there}
    # Picture features come by the entries, so the vision tower need not run again.
    without_pixels = replace(packed, pixel_values=None)
    yield
    with torch.no_grad(), replaced_entries(layers, origin), kept_experts(layers, experts):
        beginning = pooled_states(model, without_pixels, [classifier.tap])[0, 0].cpu()
        difference = log_odds - _log_odds(classifier, beginning).item()
    tokens = torch.zeros(packed.input_ids.shape[1], dtype=torch.float64)
    for step in range(steps):
        yield
        share = (step + 0.5) / steps
        points = {number: (origin[number] + share * way[number]).requires_grad_() for number in way}
        with replaced_entries(layers, points), kept_experts(layers, experts):
            feature = pooled_states(model, without_pixels, [classifier.tap])[0, 0].cpu()
        # At a layer above the last entry read, nothing depends on it.
        gradients = torch.autograd.grad(_log_odds(classifier, feature), list(points.values()), allow_unused=True)
        for gradient, part in zip(gradients, way.values(), strict=True):
            if gradient is not None:
                tokens += (gradient.cpu().double() * part.cpu().double()).sum(-1)[0] / steps
    missed = difference - float(tokens.sum())
    return Attribution(read.numpy(), log_odds, tokens.numpy(), missed, keeps_experts=bool(experts))


def occluded(
    classifier: Classifier,
    encoded: EncodedExample,
    baseline: Pictures,
    words: Sequence[Sequence[int]],
    *,
    max_tokens: int = sys.maxsize,
) -> Passes:
    """Measure by how much the log odds fall when a square is covered or a word is left out.

    A square becomes what it is in the baseline. Of a picture with more than 144 image tokens several are covered
    together and share what it makes, so that a map costs at most 144 changed examples a picture.

    Args:
        classifier: Whose answer.
        encoded: The example.
        baseline: Pictures of the same shapes: `empty_pictures` or `average_pictures`.
        words: For each word, which tokens of the text are left out with it, counted from the text's first.
        max_tokens: Most tokens of the changed examples that share a pass; one that has more is alone.
    """
    start = encoded.spans.text[0]
    changes = _squares(encoded, classifier.backbone.processor.token_side)
    changes += [_Change([start + token for token in word], len(encoded.ids) - len(word)) for word in words if word]
    groups = _grouped(changes, max_tokens)
    costs = [len(encoded.ids), *(sum(change.cost for change in group) for group in groups)]
    return Passes(costs, _occluded(classifier, encoded, baseline, groups))


@dataclass(frozen=True, slots=True)
class _Change:
    """Tokens that are covered or left out.

    Attributes:
        tokens: Their positions in the example.
        cost: How many tokens the changed example has.
        square: For a square of a picture: the number of the picture, and its rows and columns of pixels.
    """

    tokens: list[int]
    cost: int
    square: tuple[int, slice, slice] | None = None


def _occluded(
    classifier: Classifier, encoded: EncodedExample, baseline: Pictures, groups: Sequence[Sequence[_Change]]
) -> Generator[None, None, Attribution]:
    (read,) = _read(classifier, [encoded])
    (log_odds,) = _answers(classifier, read[None])
    contributions = np.zeros(len(encoded.ids))
    processor = classifier.backbone.processor
    for group in groups:
        yield
        changed = [
            _covered(encoded, baseline, *change.square, processor) if change.square else _left_out(encoded, change)
            for change in group
        ]
        for change, without in zip(group, _answers(classifier, _read(classifier, changed)), strict=True):
            contributions[change.tokens] = (log_odds - without) / len(change.tokens)
    return Attribution(read, log_odds, contributions)


def empty_pictures(pictures: Pictures, processor: Processor) -> Pictures:
    """Return pictures of the same shapes, each of its median colour: a background's own where there is one.

    Args:
        pictures: What the model reads.
        processor: That resized them.
    """
    colours = [np.median(pixels, axis=(0, 1)).round().astype(np.uint8) for pixels in pictures.pixels]
    return processor.take_pictures(
        [np.full_like(pixels, colour) for colour, pixels in zip(colours, pictures.pixels, strict=True)]
    )


def average_pictures(average: Image.Image, pictures: Pictures, processor: Processor) -> Pictures:
    """Return pictures of the same shapes, each the average picture stretched to its size.

    Args:
        average: Of mode RGB.
        pictures: What the model reads.
        processor: That resized them.
    """
    sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in pictures.pixels]
    return processor.take_pictures([np.array(average.resize(size, Image.Resampling.BICUBIC)) for size in sizes])


def _packed(classifier: Classifier, encoded: EncodedExample) -> PackedBatch:
    return pack(classifier.backbone.processor, [encoded], ((0,),), classifier.backbone.device)


def _log_odds(classifier: Classifier, feature: Tensor) -> Tensor:
    head = classifier.head
    logits: Tensor = head(feature[None].to(next(head.parameters()).device))[0]
    return (logits[1] - logits[0]) / classifier.temperature


def _read(classifier: Classifier, examples: Sequence[EncodedExample]) -> npt.NDArray[np.float32]:
    return classifier.backbone.encode_prepared(examples, [classifier.tap])[:, 0]


def _answers(classifier: Classifier, features: npt.NDArray[np.float32]) -> list[float]:
    answers: list[float] = (margins_of(classifier.logits_of(features)) / classifier.temperature).tolist()
    return answers


def _grouped(changes: Sequence[_Change], max_tokens: int) -> list[list[_Change]]:
    """Put changes that share a pass together, in their order."""
    groups: list[list[_Change]] = []
    held = 0
    for change in changes:
        if not groups or len(groups[-1]) == _AT_ONCE or held + change.cost > max_tokens:
            groups.append([])
            held = 0
        groups[-1].append(change)
        held += change.cost
    return groups


def _squares(encoded: EncodedExample, token_side: int) -> list[_Change]:
    """Divide the pictures of an example into squares of tokens that are covered together.

    Args:
        encoded: The example.
        token_side: Side of the square of pixels that is one image token.
    """
    squares = []
    pictures = zip(encoded.pictures.pixels, encoded.spans.image, strict=True)
    for number, (pixels, (first, _)) in enumerate(pictures):
        rows, columns = len(pixels) // token_side, pixels.shape[1] // token_side
        side = 1
        while math.ceil(rows / side) * math.ceil(columns / side) > _MOST_SQUARES:
            side += 1
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                bottom, right = min(top + side, rows), min(left + side, columns)
                tokens = [first + row * columns + column for row in range(top, bottom) for column in range(left, right)]
                height, width = (
                    slice(start * token_side, end * token_side) for start, end in ((top, bottom), (left, right))
                )
                squares.append(_Change(tokens, len(encoded.ids), (number, height, width)))
    return squares


def _covered(
    encoded: EncodedExample, baseline: Pictures, number: int, rows: slice, columns: slice, processor: Processor
) -> EncodedExample:
    """Return an example in which a square of one picture is what it is in the baseline."""
    pixels = list(encoded.pictures.pixels)
    pixels[number] = pixels[number].copy()
    pixels[number][rows, columns] = baseline.pixels[number][rows, columns]
    return replace(encoded, pictures=processor.take_pictures(pixels))


def _left_out(encoded: EncodedExample, word: _Change) -> EncodedExample:
    """Return an example without some tokens of its text."""
    gone = set(word.tokens)
    ids = [token for position, token in enumerate(encoded.ids) if position not in gone]
    start, end = encoded.spans.text
    left = len(gone)
    image = tuple((first - left, last - left) if first >= end else (first, last) for first, last in encoded.spans.image)
    spans = Spans(tokens=((0, len(ids)),), image=image, text=(start, end - left))
    prefix = encoded.prefix_length if encoded.shares_prefix else len(ids)
    return replace(encoded, ids=ids, spans=spans, prefix_length=prefix)
