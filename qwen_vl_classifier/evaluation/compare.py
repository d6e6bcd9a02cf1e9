"""Compare two classifiers on the same rows, pair by pair: what they share cancels out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import check_numbers
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.data.targets import labels_of
from qwen_vl_classifier.evaluation.evaluation import describe
from qwen_vl_classifier.evaluation.intervals import paired_metrics
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.splitting import check_grouping, groups_of

COMPARISON_VERSION = 1


def compare(
    a: Classifier,
    b: Classifier,
    examples: Source,
    *,
    names: tuple[str, str] = ("A", "B"),
    config: EvaluateConfig | None = None,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare two classifiers, each with its own threshold.

    Args:
        a: One.
        b: The other.
        examples: At least one, all with labels: anything that `load_examples` takes; neither should have been trained
            on them.
        names: What the two are called.
        config: Resamples, seed, and how many rows may be left out.
        store: Where features are kept, if anywhere.
        progress: Show a progress bar.

    Returns:
        `comparison_version`, `sentence`, `notes`, `rows`, `groups`; `a` and `b` (name and what each is made of);
        `metrics`, each with `a`, `b`, `difference` (a less b), its 95 % interval `low` and `high` by paired, grouped
        bootstrap, and `better` ("A", "B" or `None` where the interval holds 0); `mcnemar`, see there; and `left_out`,
        where rows were.

    Raises:
        DataError: No examples, or one without a label.
        ImageError: More pictures cannot be opened than `config.max_errors` allows; the message lists the rows.
    """
    config = config or EvaluateConfig()
    examples = as_examples(examples, class_names=a.label_names)
    labels_of(examples, what="evaluation", both=False)
    check_grouping(examples, config.group_by)
    given, bad = len(examples), BadRows(config.max_errors, can_leave_out=True)
    read_sizes(examples, bad, progress=progress)
    bad.check(given)
    features = _features(a, b, examples, bad, store=store, progress=progress)
    bad.check(given)
    sides = [check_numbers(side.probabilities_of(read)[:, 1]) for side, read in zip((a, b), features, strict=True)]
    examples = bad.without(examples)
    labels = labels_of(examples, what="evaluation", both=False)
    groups = groups_of(examples, config.group_by)
    metrics = paired_metrics(
        labels, sides[0], sides[1], (a.threshold, b.threshold), groups, resamples=config.resamples, seed=config.seed
    )
    right = [(side >= made.threshold) == (labels == 1) for side, made in zip(sides, (a, b), strict=True)]
    counted = int(groups.max()) + 1
    notes = [bad.note(given)] if bad else []
    if counted < len(labels):
        notes.append(
            f"{len(labels):,} rows in {counted:,} groups that share a picture, text or group: intervals resample whole "
            "groups; McNemar's test takes rows as independent and is too sure"
        )
    return {
        "comparison_version": COMPARISON_VERSION,
        "sentence": _sentence(metrics["accuracy"], len(labels)),
        "notes": notes,
        "rows": len(labels),
        "groups": counted,
        "a": {"name": names[0]} | describe(a),
        "b": {"name": names[1]} | describe(b),
        "metrics": metrics,
        "mcnemar": mcnemar(right[0], right[1]),
    } | ({"left_out": bad.to_json(given)} if bad else {})


def _features(
    a: Classifier, b: Classifier, examples: Sequence[Example], bad: BadRows, **reading: Any
) -> list[npt.NDArray[np.float32]]:
    """Return the features that each reads, shape (examples that are not bad, hidden): of one backbone, in one pass."""
    if a.backbone.fingerprint == b.backbone.fingerprint and a.tap != b.tap:
        deeper = max((a, b), key=lambda side: side.backbone.num_layers)
        both = extract_features(examples, deeper.backbone, [a.tap, b.tap], bad=bad, **reading)
        return [both[:, 0], both[:, 1]]
    one = extract_features(examples, a.backbone, [a.tap], bad=bad, **reading)[:, 0]
    if a.backbone.fingerprint == b.backbone.fingerprint:
        return [one, one]
    return [one, extract_features(examples, b.backbone, [b.tap], bad=bad, **reading)[:, 0]]


def mcnemar(right_a: npt.NDArray[np.bool_], right_b: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Test whether two classifiers are right equally often, exactly (McNemar, 1947; the binomial form).

    Args:
        right_a: Shape (n,), whether one is right.
        right_b: Shape (n,), whether the other is.

    Returns:
        `both`, `only_a`, `only_b` and `neither`, counts of rows; and `p_value`, two-sided, 1 where they never differ.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    return {
        "both": int((right_a & right_b).sum()),
        "only_a": only_a,
        "only_b": only_b,
        "neither": int((~right_a & ~right_b).sum()),
        "p_value": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }


def _sentence(accuracy: dict[str, Any], rows: int) -> str:
    a, b, better = accuracy["a"], accuracy["b"], accuracy["better"]
    compared = f"accuracy {a:.3f} for A and {b:.3f} for B on {rows:,} rows"
    if better is None:
        return f"Neither is shown to be right more often: {compared}."
    return f"{better} is right more often: {compared}."
