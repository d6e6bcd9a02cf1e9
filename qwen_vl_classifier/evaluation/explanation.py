"""Explain one answer: which squares of the picture and which words moved the probability.

What moves is the log odds, log(p / (1 - p)), since contributions to it add up. `attribution` has the three methods,
docs/explanation/explain.md what was measured of them.
"""

from __future__ import annotations

import base64
import bisect
import io
import itertools
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from qwen_vl_classifier.classifier.average_picture import FEWEST_PICTURES
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.spelling import did_you_mean
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.errors import ConfigError, DataError, ExplanationError, ImageError, shown
from qwen_vl_classifier.evaluation.attribution import (
    GRADIENT_COST,
    Attribution,
    FloatArray,
    Passes,
    along_the_path,
    at_the_tap,
    average_pictures,
    empty_pictures,
    occluded,
)
from qwen_vl_classifier.evaluation.explanation_picture import draw_explanation
from qwen_vl_classifier.files.html_pieces import fact_card, picture_block
from qwen_vl_classifier.images.source import ImageSource

Method: TypeAlias = Literal["gradients", "tokens", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)
Baseline: TypeAlias = Literal["average", "empty"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
_BASELINE_NAMES = {"average": "the average training picture", "empty": "an empty picture of one colour"}
_MUCH_MISSED = 0.05  # of all that squares and words contribute, without their signs
_LITTLE = 0.01  # log odds
UNIT = "log odds of class 1, after the temperature and before an isotonic curve"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Explanation:
    """What moved one probability. All contributions are in log odds: positive ones speak for class 1.

    Attributes:
        probability: Calibrated probability of class 1.
        log_odds: Its log odds, before the isotonic curve where there is one: the sum of all that follows.
        patches: For each picture, the contributions of its image tokens: shape (rows, columns). A token is a square
            of the picture as it was resized, `merge_size` x `merge_size` patches large.
        words: Each word of the text with its contribution, in the order of the text.
        template: Contribution of the prompt's tokens around pictures and text.
        rest: What no token accounts for. By gradients, the log odds of the baseline and no words, and what the
            steps miss; by tokens, the head's bias and, unless `exact`, what a first-order view leaves out; by
            occlusion, a remainder without a meaning of its own.
        method: One of `METHODS`.
        exact: Whether contributions and the head's bias alone make up the log odds, as they do by tokens for a
            linear head.
        baseline: What the picture is compared with: "average", the average training picture, or "empty", one of the
            picture's median colour; `None` where there is no picture, and for tokens.
        missed: The part of `rest` that the steps from the baseline miss: by gradients, where the answer changes
            abruptly along the way.
        keeps_experts: Whether the baseline was given the experts that this example's tokens have: by gradients, of
            a mixture of experts.
        images: The pictures that were explained, as they were given.
        label_names: What class 0 and class 1 are called.
    """

    probability: float
    log_odds: float
    patches: list[FloatArray]
    words: list[tuple[str, float]]
    template: float
    rest: float
    method: Method
    exact: bool
    baseline: Baseline | None = None
    missed: float = 0.0
    keeps_experts: bool = False
    images: tuple[ImageSource, ...] = ()
    label_names: tuple[str, str] = PLAIN_NAMES

    def __repr__(self) -> str:
        return (
            f"<Explanation: probability {self.probability:.4f} of {self._positive}, log odds {self.log_odds:+.3g}, by "
            f"{self.method}, {len(self.patches)} pictures, {len(self.words)} words>"
        )

    def _repr_html_(self) -> str:
        """Return the picture that `explain` draws on the command line, for notebooks."""
        notes = [f"probability {self.probability:.4f} of {self._positive}", *self.summary()]
        try:
            drawn = draw_explanation(self.images, self)
        except ImageError as error:  # its file was removed since
            return fact_card("Explanation", {}, [*notes, str(error)])
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return picture_block(data, "Contributions of squares of the picture and of words", notes)

    @property
    def _positive(self) -> str:
        name = self.label_names[1]
        return "class 1" if name == PLAIN_NAMES[1] else f"class 1 ({shown(name)})"

    @property
    def caption(self) -> str | None:
        """What the squares explain, in words; `None` where nothing is compared."""
        return self.baseline and f"squares explain the difference from {_BASELINE_NAMES[self.baseline]}"

    def summary(self) -> list[str]:
        """Describe what the contributions explain and start from, and warn where the start outweighs the answer.

        Squares that all speak against the answer are no contradiction where the start lies beyond it.
        """
        lines = [self.caption] if self.caption else []
        if self.method == "occlusion":
            return lines
        picture = sum(float(grid.sum()) for grid in self.patches)
        words = sum(value for _, value in self.words)
        moved = sum(float(abs(grid).sum()) for grid in self.patches) + sum(abs(value) for _, value in self.words)
        start, end = self.rest - self.missed, self.log_odds
        if misses := abs(self.missed) > max(_MUCH_MISSED * moved, _LITTLE):
            end -= self.missed
        lines += [
            f"{self._start()} {start:+.3g} log odds; the picture adds {picture:+.3g}, the words {words:+.3g} and the "
            f"template {self.template:+.3g}: {end:+.3g} in all"
        ]
        if misses:
            lines.append(
                f"warning: the log odds are {self.log_odds:+.3g}, and change abruptly on the way from the start: the "
                f"steps miss {self.missed:+.3g}; compare with occlusion"
            )
        if abs(start) > abs(self.log_odds):
            lines.append(
                "warning: this start outweighs the answer; contributions show how the example differs from the start, "
                "not why this answer is given"
            )
        return lines

    def _start(self) -> str:
        if self.method == "tokens":
            return "before any token is counted:"
        experts = " (with the experts that this example uses)" if self.keeps_experts else ""
        return (
            f"{_BASELINE_NAMES[self.baseline]} without words{experts}:" if self.baseline else f"without words{experts}:"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return {
            "probability": self.probability,
            "log_odds": self.log_odds,
            "unit": UNIT,
            "method": self.method,
            "exact": self.exact,
            "baseline": self.baseline,
            "words": [{"word": word, "contribution": value} for word, value in self.words],
            "patches": [grid.tolist() for grid in self.patches],
            "template": self.template,
            "rest": self.rest,
            "summary": self.summary(),
        }


def explain(
    classifier: Classifier, example: Source, *, method: Method = "gradients", baseline: Baseline | None = None
) -> Explanation:
    """Explain a classifier's answer for one example.

    Args:
        classifier: The classifier whose answer is explained.
        example: One example, or one row as `load_examples` takes it. A label is not looked at.
        method: "gradients", integrated from the baseline and no words, for any tap; "tokens", the share of each token
            in the average that the head reads, for taps that average over the picture; "occlusion", what the answer
            loses without a square or a word, slow. See `attribution`.
        baseline: What the picture is compared with, by gradients and occlusion: "average", the average training
            picture; "empty", one colour, the median of the picture's own. `None` takes the average where the
            classifier has one.

    Raises:
        ConfigError: An unknown method or baseline, "tokens" for a tap that reads no image tokens or with a baseline,
            or "average" of a classifier that has none.
        DataError: Not one row, or one that cannot be used.
        ImageError: A picture cannot be opened.
        OutOfMemoryError: The pass, which keeps activations for a gradient, does not fit.
    """
    return PlannedExplanation(classifier, example, method=method, baseline=baseline).run()


class PlannedExplanation:
    """An explanation whose passes are known and not run yet; others may use the model between any two.

    Args:
        classifier: As for `explain`, and so are `example`, `method` and `baseline`.
        max_tokens: Most that a pass over one example may cost, as in `costs`.
        max_shared_tokens: Most tokens of a pass that changed examples share, by occlusion.

    Attributes:
        costs: Of each pass: its tokens, times three where it keeps a gradient.
        nbytes: How many bytes its pictures take up, prepared for the model.

    Raises:
        ConfigError: As `explain`, and so are `DataError` and `ImageError`.
        ExplanationError: The example costs more than one pass may.
    """

    def __init__(
        self,
        classifier: Classifier,
        example: Source,
        *,
        method: Method = "gradients",
        baseline: Baseline | None = None,
        max_tokens: int = sys.maxsize,
        max_shared_tokens: int = sys.maxsize,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"method {method!r}: give one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
        if method == "tokens" and classifier.tap.pooling not in ("mean", "image"):
            raise ConfigError(
                f"method tokens: the tap {classifier.tap} reads no image tokens, and a picture would get no "
                "contribution; give gradients or occlusion"
            )
        self._classifier = classifier
        self._method: Method = method
        self._baseline = _checked_baseline(classifier, method, baseline)
        rows = as_examples(example, read_labels=False)
        if len(rows) != 1:
            raise DataError(f"got {len(rows)} rows; expected one example; explain them one after the other")
        self._images = rows[0].images
        processor = classifier.backbone.processor
        (self._encoded,) = classifier.backbone.prepare(rows)
        self._words = join_tokens(rows[0].text, processor.text_offsets(rows[0]))
        self._check_cost(max_tokens)
        self._passes = self._plan(max_shared_tokens)
        self.costs = self._passes.costs
        self.nbytes = self._encoded.pictures.nbytes * (1 if method == "tokens" else 2)

    def run(self) -> Explanation:
        """Run all passes that are left."""
        while (found := self.run_pass()) is None:
            pass
        return found

    def run_pass(self) -> Explanation | None:
        """Run the next pass; return the explanation after the last.

        Raises:
            OutOfMemoryError: The pass does not fit.
        """
        found = self._passes.run_one()
        return None if found is None else self._explanation(found)

    def _check_cost(self, max_tokens: int) -> None:
        cost = len(self._encoded.ids) * (GRADIENT_COST if self._method == "gradients" else 1)
        if cost > max_tokens:
            counted = f"; by gradients each counts {GRADIENT_COST} times" if self._method == "gradients" else ""
            raise ExplanationError(
                f"text and pictures make {len(self._encoded.ids):,} tokens{counted}; expected at most "
                f"{max_tokens:,} in one pass; send a shorter text or smaller pictures"
            )

    def _plan(self, max_shared_tokens: int) -> Passes:
        classifier, encoded = self._classifier, self._encoded
        if self._method == "tokens":
            return at_the_tap(classifier, encoded)
        if self._baseline == "average" and classifier.average is not None:
            others = average_pictures(classifier.average, encoded.pictures, classifier.backbone.processor)
        else:
            others = empty_pictures(encoded.pictures, self._classifier.backbone.processor)
        if self._method == "gradients":
            return along_the_path(classifier, encoded, others)
        words = [tokens for _, tokens in self._words]
        return occluded(classifier, encoded, others, words, max_tokens=max_shared_tokens)

    def _explanation(self, found: Attribution) -> Explanation:
        encoded, tokens = self._encoded, found.tokens
        start, end = encoded.spans.text
        merge_size = self._classifier.backbone.processor.merge_size
        patches = [
            tokens[first:last].reshape(height // merge_size, width // merge_size)
            for (first, last), (_, height, width) in zip(encoded.spans.image, encoded.pictures.grids, strict=True)
        ]
        spoken = float(tokens[start:end].sum())
        template = float(tokens.sum() - spoken - sum(grid.sum() for grid in patches))
        return Explanation(
            probability=float(self._classifier.probabilities_of(found.feature[None])[0, 1]),
            log_odds=found.log_odds,
            patches=patches,
            words=[(word, float(tokens[start:end][own].sum())) for word, own in self._words],
            template=template,
            rest=found.log_odds - float(tokens.sum()),
            method=self._method,
            exact=self._method == "tokens" and self._classifier.spec.kind == "linear",
            baseline=self._baseline if patches else None,
            missed=found.missed,
            keeps_experts=found.keeps_experts,
            images=self._images,
            label_names=self._classifier.label_names,
        )


def _checked_baseline(classifier: Classifier, method: Method, baseline: Baseline | None) -> Baseline | None:
    """Return what pictures are compared with; `None` for a method that compares with nothing."""
    if baseline is None:
        return None if method == "tokens" else "empty" if classifier.average is None else "average"
    if baseline not in BASELINES:
        raise ConfigError(f"baseline {baseline!r}: expected one of {', '.join(BASELINES)}")
    if method == "tokens":
        raise ConfigError(
            f"baseline {baseline} with method tokens, which uses no baseline; leave it out, "
            "or give gradients or occlusion"
        )
    if baseline == "average" and classifier.average is None:
        raise ConfigError(
            f"baseline {baseline}: this classifier keeps no average picture, which needs "
            f"{FEWEST_PICTURES} distinct training pictures and a version that keeps it; train it again, or give "
            f"baseline empty"
        )
    return baseline


def join_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[str, list[int]]]:
    """Join the tokens of a text to words.

    Words are runs of letters and digits, or of punctuation, between spaces; in scripts without spaces, single
    characters. Words that share a token become one. A token of spaces alone counts with the word after it.

    Args:
        text: The text.
        offsets: For each token, the half-open range of its characters.

    Returns:
        Words with the numbers of their tokens, in the order of the text; text without any word in it is one word, if
        it has tokens at all.

    Example:
        >>> join_tokens("a redcar.", [(0, 1), (1, 5), (5, 8), (8, 9)])
        [('a', [0]), ('redcar', [1, 2]), ('.', [3])]
    """
    runs = _runs_of(text)
    if not runs:
        return [(text, list(range(len(offsets))))] if offsets else []
    ends = [end for _, end in runs]
    tokens: list[list[int]] = [[] for _ in runs]
    joined = [False] * len(runs)  # with the run before it
    for token, (start, end) in enumerate(offsets):
        run = min(bisect.bisect_right(ends, start), len(runs) - 1)  # the first that ends after the token begins
        tokens[run].append(token)
        while run + 1 < len(runs) and runs[run + 1][0] < end:
            run += 1
            joined[run] = True
    words: list[tuple[str, list[int]]] = []
    start = 0
    for (first, end), glued, own in zip(runs, joined, tokens, strict=True):
        if glued:
            words[-1] = (text[start:end], words[-1][1] + own)
        else:
            start = first
            words.append((text[first:end], own))
    return words


def _runs_of(text: str) -> list[tuple[int, int]]:
    """Cut a text into runs of one kind of character; spaces are left out."""
    runs = []
    for kind, characters in itertools.groupby(enumerate(text), key=lambda item: _kind(item[1])):
        indices = [index for index, _ in characters]
        if kind == "alone":
            runs += [(index, index + 1) for index in indices]
        elif kind != "space":
            runs.append((indices[0], indices[-1] + 1))
    return runs


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    # Marks are letters too: many scripts, and decomposed accents, write vowels with them.
    if unicodedata.category(character)[0] in "PS" and character not in "'’":
        return "punctuation"
    hangul = "\uac00" <= character <= "\ud7a3"  # as wide as other East Asian script, but written with spaces
    return "alone" if unicodedata.east_asian_width(character) == "W" and not hangul else "letter"
