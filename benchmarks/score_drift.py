"""What drift looks like: the stability index of scores on rows like those of training, and on others.

    qwen-vl-classifier demo --out demo
    python benchmarks/score_drift.py demo

The index compares scores with those in the classifier's training record; `chance` is what it exceeds once in 1,000
times if nothing has changed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from qwen_vl_classifier import Classifier, Example, load_examples
from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution, recorded_distribution
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
    parser.add_argument("demo", type=Path, help="folder that `qwen-vl-classifier demo` wrote")
    demo = parser.parse_args().demo
    classifier = Classifier.load(demo / "classifier")
    distribution = recorded_distribution(classifier.training, name="classifier")
    if distribution is None:
        raise SystemExit("the training record has no distribution of scores; run the demo again")
    test = load_examples(demo / "data" / "test.jsonl", require_labels=True)
    kinds = sorted({str(example.fields["kind"]) for example in test})
    sets: dict[str, Sequence[Example]] = {"test rows": test, "blurred": [blurred(example) for example in test]}
    sets |= {f"only {kind}": [example for example in test if example.fields["kind"] == kind] for kind in kinds}
    print(f"{'rows':<20}{'count':>7}{'PSI':>8}{'chance':>8}{'accuracy':>10}")
    for name, examples in sets.items():
        scores = classifier.predict_proba(examples)[:, 1]
        right = (scores >= classifier.threshold) == [example.label == 1 for example in examples]
        index, chance = distribution.compare(distribution.counts_of(scores))
        print(f"{name:<20}{len(examples):>7}{index:>8.3f}{chance:>8.3f}{right.mean():>10.3f}")
    print(f"counting an answer: {1e6 * seconds_of_an_answer(distribution):.1f} µs")


if __name__ == "__main__":
    main()
