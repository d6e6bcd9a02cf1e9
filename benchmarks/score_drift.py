"""What drift looks like: the stability index of scores on rows like those of training, and on others.

    python benchmarks/score_drift.py

A classifier is trained on 1,200 statements about synthetic scenes, and scores 600 about others. The index compares
these scores with those in the training record; `chance` is what it exceeds once in 1,000 times if nothing has
changed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from qwen_vl_classifier import Backbone, Classifier, Example, load_examples, train
from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution, recorded_distribution
from qwen_vl_classifier.scenes.statements import write_dataset
from qwen_vl_classifier.serving.observability.prometheus import MODEL_LABELS, Metrics

BLUR = 6  # pixels
ANSWERS = 50_000


def blurred(example: Example) -> Example:
    """Return an example with its picture out of focus."""
    with Image.open(example.images[0]) as picture:
        return replace(example, image=picture.convert("RGB").filter(ImageFilter.GaussianBlur(BLUR)))


def seconds_of_an_answer(distribution: ScoreDistribution) -> float:
    """Measure what it costs to count an answer, in processor time."""
    metrics = Metrics()
    metrics.models({"a": dict.fromkeys(MODEL_LABELS, "a")}, {"a": distribution})
    scores = np.random.default_rng(0).random(ANSWERS).tolist()
    began = time.process_time()
    for score in scores:
        metrics.answered("a", score, "yes")
    return (time.process_time() - began) / ANSWERS


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        training, test = (
            load_examples(write_dataset(folder, name=name, seed=seed, scenes=scenes, per_scene=3), require_labels=True)
            for name, seed, scenes in (("train", 0, 400), ("test", 1, 200))
        )
        classifier = train(training, backbone=Backbone.load("builtin:tiny")).classifier
        distribution = recorded_distribution(classifier.training, name="classifier")
        assert distribution is not None
        print_table(classifier, distribution, test)
    print(f"counting an answer: {1e6 * seconds_of_an_answer(distribution):.1f} µs")


def print_table(classifier: Classifier, distribution: ScoreDistribution, test: list[Example]) -> None:
    """Print the index of the test rows, of blurred ones, and of one kind of statement alone."""
    kinds = sorted({str(example.fields["kind"]) for example in test})
    sets: dict[str, Sequence[Example]] = {"test rows": test, "blurred": [blurred(example) for example in test]}
    sets |= {f"only {kind}": [example for example in test if example.fields["kind"] == kind] for kind in kinds}
    print(f"{'rows':<20}{'count':>7}{'PSI':>8}{'chance':>8}{'accuracy':>10}")
    for name, examples in sets.items():
        scores = classifier.predict_proba(examples)[:, 1]
        right = (scores >= classifier.threshold) == [example.label == 1 for example in examples]
        index, chance = distribution.compare(distribution.counts_of(scores))
        print(f"{name:<20}{len(examples):>7}{index:>8.3f}{chance:>8.3f}{right.mean():>10.3f}")


if __name__ == "__main__":
    main()
