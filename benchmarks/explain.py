"""Measure whether explanations point where they should, on scenes whose contents are known.

    python benchmarks/explain.py                        # prints one table; some minutes on one core
    python benchmarks/explain.py --side 224 --scenes 50

Three questions, of each method at two taps of the built-in backbone, with a linear head trained on statements of
existence:

- Deletion: by how much the probability of the predicted class falls when the fifth of the squares that speak most for
  it is painted over with the background, less the same for as many random squares.
- The object: in scenes whose true statement fits one thing, the mean weight (absolute contribution) of the squares
  that it touches, as a multiple of the mean weight of all. Were all weight on these squares evenly, it would be the
  "at most" beside it.
- Words: the correlation of the words' contributions with those by occlusion.

Intervals are 95 %, by bootstrap over scenes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from qwen_vl_classifier import Backbone, Classifier, Example, TrainConfig, explain, train
from qwen_vl_classifier.evaluation.explanation import BASELINES, METHODS, Baseline, Method
from qwen_vl_classifier.scenes.drawing import Scene, Thing
from qwen_vl_classifier.scenes.statements import Statement, scene_examples

Array: TypeAlias = npt.NDArray[np.float64]
Case: TypeAlias = tuple[Image.Image, Scene, Statement]

TAPS = ("mean:-1", "last:-1")
_SHARE = 0.2  # of the squares that are painted over
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values, with a bootstrap interval."""
    array = np.asarray(values)
    means = array[np.random.default_rng(0).integers(len(array), size=(_RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))


def probe(backbone: Backbone, tap: str, *, scenes: int = 300) -> Classifier:
    """Train a linear head on statements of existence, two about each scene."""
    rows = [
        Example(picture, line.text, line.label)
        for picture, _, lines in scene_examples("demo", scenes=scenes, per_scene=2, kinds=("existence",))
        for line in lines
    ]
    config = TrainConfig(taps=tap, heads="linear", folds=3)
    return train(rows, backbone=backbone, config=config, progress=False).classifier


def cases(seed: int, size: tuple[int, int] | None) -> Iterator[Case]:
    """Yield scenes that were never trained on, with one statement of existence each, true or false."""
    made = scene_examples("evaluation", seed=seed, scenes=10_000, kinds=("existence",), size=size)
    yield from ((picture, scene, lines[0]) for picture, scene, lines in made if lines)


def named(scene: Scene, statement: Statement) -> Thing | None:
    """Return the thing that a true statement of existence names, if only one fits."""
    fitting = [thing for thing in scene.things if f"{thing.colour} {thing.shape}" in statement.text]
    return fitting[0] if len(fitting) == 1 else None


def touched(scene: Scene, thing: Thing, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Tell which squares of a grid over the picture a thing's circle reaches into."""
    height, width = scene.height / shape[0], scene.width / shape[1]
    top, left = np.arange(shape[0])[:, None] * height, np.arange(shape[1])[None] * width
    away_y = thing.y - np.clip(thing.y, top, top + height)
    away_x = thing.x - np.clip(thing.x, left, left + width)
    reached: npt.NDArray[np.bool_] = np.hypot(away_y, away_x) < thing.radius
    return reached


def painted_over(case: Case, squares: npt.NDArray[np.intp], shape: tuple[int, int]) -> Image.Image:
    """Return the picture with some squares, numbered row by row, in the colour of the background."""
    picture, scene, _ = case
    changed = picture.copy()
    pen = ImageDraw.Draw(changed)
    for square in squares:
        row, column = divmod(int(square), shape[1])
        left, right = (scene.width * at // shape[1] for at in (column, column + 1))
        top, bottom = (scene.height * at // shape[0] for at in (row, row + 1))
        pen.rectangle((left, top, right - 1, bottom - 1), fill=scene.background)
    return changed


def advantage(classifier: Classifier, case: Case, contributions: Array, rng: np.random.Generator, draws: int) -> float:
    """Return by how much more the predicted class loses with the map's squares than with random ones."""
    picture, _, statement = case
    predicted = int(classifier.predict_proba([Example(picture, statement.text)])[0, 1] >= 0.5)
    speaking = contributions.ravel() if predicted else -contributions.ravel()
    count = max(1, round(_SHARE * speaking.size))
    removed = [np.argsort(-speaking)[:count], *(rng.permutation(speaking.size)[:count] for _ in range(draws))]
    rows = [Example(painted_over(case, squares, contributions.shape), statement.text) for squares in removed]  # type: ignore[arg-type]
    left = classifier.predict_proba(rows)[:, predicted]
    return float(left[1:].mean() - left[0])


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one method at one tap; `None` where a scene had nothing to measure."""

    deletion: Interval
    weight: Interval | None
    most: float
    words: Interval | None


def measure(
    classifier: Classifier,
    method: Method,
    baseline: Baseline | None,
    scenes: Sequence[Case],
    objects: Sequence[Case],
    *,
    draws: int = 8,
) -> Measured:
    """Measure one method: deletion and words on all scenes, weight on the scenes whose statement names one thing."""
    rng = np.random.default_rng(0)
    advantages, ratios, most, alike = [], [], [], []
    for case in scenes:
        example = Example(case[0], case[2].text)
        explanation = explain(classifier, example, method=method, baseline=baseline)
        advantages.append(advantage(classifier, case, explanation.patches[0], rng, draws))
        if method == "gradients":
            reference = explain(classifier, example, method="occlusion", baseline=baseline)
            both = [[value for _, value in found.words] for found in (explanation, reference)]
            alike.append(float(np.corrcoef(both)[0, 1]))
    for picture, scene, statement in objects:
        thing = named(scene, statement)
        assert thing is not None
        example = Example(picture, statement.text)
        (grid,) = explain(classifier, example, method=method, baseline=baseline).patches
        reached = touched(scene, thing, grid.shape)  # type: ignore[arg-type]
        ratios.append(float(np.abs(grid)[reached].mean() / np.abs(grid).mean()))
        most.append(float(1 / reached.mean()))
    return Measured(
        interval(advantages),
        interval(ratios) if ratios else None,
        float(np.mean(most)) if most else 0.0,
        interval(alike) if alike else None,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--scenes", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="random deletions of each (default: %(default)s)")
    parser.add_argument("--side", type=int, help="side of square pictures in pixels; those of pre-training without")
    parser.add_argument("--training-scenes", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    size = (options.side, options.side) if options.side else None
    scenes = list(itertools.islice(cases(options.seed, size), options.scenes))
    fitting = (case for case in cases(options.seed + 1, size) if named(case[1], case[2]))
    objects = list(itertools.islice(fitting, options.scenes))
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype="float32")
    titles = "tap", "method", "baseline", "deletion, less random", "object's weight / mean", "at most", "words"
    print(f"| {' | '.join(titles)} |")
    print("|---|---|---|---|---|---|---|")
    for tap in TAPS:
        classifier = probe(backbone, tap, scenes=options.training_scenes)
        for method in METHODS:
            if method == "tokens" and classifier.tap.pooling == "last":
                continue
            for baseline in (None,) if method == "tokens" else BASELINES:
                found = measure(classifier, method, baseline, scenes, objects, draws=options.draws)
                most = f"{found.most:.1f}"
                cells = [tap, method, baseline or "", found.deletion, found.weight, most, found.words or ""]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
