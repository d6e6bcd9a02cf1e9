"""Compare two classifiers on the same rows, pair by pair: what they share cancels out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.evaluation.evaluate import checked_labels, describe
from qwen_vl_classifier.evaluation.intervals import bootstrap, bounds
from qwen_vl_classifier.evaluation.metrics import (
    LOWER_IS_BETTER,
    Labels,
    Measure,
    Probabilities,
    compute_metrics,
    plain,
)
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
        config: Resamples and seed.
        store: Where features are kept, if anywhere.
        progress: Show a progress bar.

    Returns:
        `comparison_version`, `sentence`, `notes`, `rows`, `groups`; `a` and `b` (name and what each is made of);
        `metrics`, each with `a`, `b`, `difference` (a less b), its 95 % interval `low` and `high` by paired, grouped
        bootstrap, and `better` ("A", "B" or `None` where the interval holds 0); and `mcnemar`, see there.

    Raises:
        DataError: No examples, or one without a label.
        ImageError: A picture cannot be opened.
    """
    config = config or EvaluateConfig()
    examples = as_examples(examples, class_names=a.label_names)
    labels = checked_labels(examples)
    check_grouping(examples, config.group_by)
    sides = [side.predict_proba(examples, store=store, progress=progress)[:, 1] for side in (a, b)]
    groups = groups_of(examples, config.group_by)
    metrics = paired_metrics(
        labels, sides[0], sides[1], (a.threshold, b.threshold), groups, resamples=config.resamples, seed=config.seed
    )
    right = [(side >= made.threshold) == (labels == 1) for side, made in zip(sides, (a, b), strict=True)]
    counted = int(groups.max()) + 1
    notes = []
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
    }


def paired_metrics(
    labels: Labels,
    a: Probabilities,
    b: Probabilities,
    thresholds: tuple[float, float],
    groups: npt.NDArray[np.int64],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compare every metric of two sets of probabilities of the same rows, on the same resamples.

    Args:
        labels: Shape (n,), 0 or 1.
        a: Shape (n,), of class 1.
        b: Shape (n,), of class 1.
        thresholds: Of a and b.
        groups: Shape (n,), numbers of groups.
        resamples: How many.
        seed: Of the resamples.

    Returns:
        As `metrics` of `compare`.
    """
    first, second = bootstrap(
        [Measure(labels, a, thresholds[0]), Measure(labels, b, thresholds[1])], groups, resamples=resamples, seed=seed
    )
    values = [compute_metrics(labels, side, at) for side, at in zip((a, b), thresholds, strict=True)]
    found = {}
    for name, own in values[0].items():
        other = values[1][name]
        entry: dict[str, Any] = {"a": own, "b": other, "difference": None, "low": None, "high": None, "better": None}
        if own is not None and other is not None:
            low, high = bounds(first[name] - second[name])
            entry |= {"difference": own - other, "low": plain(low), "high": plain(high)}
            if low > 0 or high < 0:
                entry["better"] = "A" if (low > 0) != (name in LOWER_IS_BETTER) else "B"
        found[name] = entry
    return found


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
