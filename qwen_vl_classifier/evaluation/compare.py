"""Compare classifiers on the same rows, pair by pair, so that rows that are hard for all of them cancel out."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import fftconvolve
from scipy.stats import binom

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.probabilities import check_numbers
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.data.targets import labels_of
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.evaluation.evaluation import describe, measured, picture_name
from qwen_vl_classifier.evaluation.intervals import bootstrap, differences, intervals_of
from qwen_vl_classifier.evaluation.metrics import Measure, baselines, compute_metrics, confusion
from qwen_vl_classifier.evaluation.slices import SIGNIFICANT, holm
from qwen_vl_classifier.evaluation.verdict import comparison_sentence
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.html_pieces import page_frame
from qwen_vl_classifier.training.splitting import check_grouping, groups_of

COMPARISON_VERSION = 2


class Comparison(dict[str, Any]):
    """A plain dictionary that can be written as JSON, and that notebooks show as its page."""

    def __repr__(self) -> str:
        """Summarise it in one line; `dict(comparison)` shows all of it."""
        return f"<Comparison on {self['rows']['total']:,} rows: {self['sentence']}>" if self else "<Comparison: empty>"

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        from qwen_vl_classifier.evaluation.report import render_comparison  # nothing else here needs templates

        return page_frame(render_comparison(self), f"Comparison: {self['sentence']}")


def compare(
    classifiers: Sequence[Classifier],
    examples: Source,
    *,
    names: Sequence[str] | None = None,
    config: EvaluateConfig | None = None,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare two or more classifiers, each with its own threshold; those of one backbone share its pass.

    Args:
        classifiers: At least two.
        examples: At least one, all with labels: anything that `load_examples` takes; no classifier should have been
            trained on them.
        names: What the classifiers are called, each differently; `None` calls them A, B, C, ...
        config: Resamples, seed, and how many rows may be left out.
        store: Where features are kept, if anywhere.
        progress: Show progress bars.

    Returns:
        `comparison_version` and what `docs/reference/files.md` describes key by key.

    Raises:
        ConfigError: Fewer than two classifiers, names that do not fit, or classifiers that number the same two classes
            differently.
        DataError: No examples, or one without a label.
        ImageError: More pictures cannot be opened than `config.max_errors` allows; the message lists the rows.
    """
    config = config or EvaluateConfig()
    names = _checked_names(classifiers, names)
    about = measured(examples)
    label_names = _label_names(classifiers, names)
    examples = as_examples(examples, class_names=label_names, max_errors=config.max_errors)
    labels_of(examples, what="evaluation", both=False)
    check_grouping(examples, config.group_by)
    given, bad = len(examples), BadRows(config.max_errors, can_leave_out=True, given=examples)
    read_sizes(examples, bad, progress=progress)
    bad.check(given)
    probabilities = _probabilities(classifiers, examples, bad, store=store, progress=progress)
    examples = bad.without(examples)
    labels, groups = labels_of(examples, what="evaluation", both=False), groups_of(examples, config.group_by)

    thresholds = [classifier.threshold for classifier in classifiers]
    measures = [Measure(labels, *side) for side in zip(probabilities, thresholds, strict=True)]
    values = [compute_metrics(labels, *side) for side in zip(probabilities, thresholds, strict=True)]
    draws = bootstrap(measures, groups, resamples=config.resamples, seed=config.seed, progress=progress)
    right = [(side >= at) == (labels == 1) for side, at in zip(probabilities, thresholds, strict=True)]
    ranking = sorted(range(len(values)), key=lambda index: (-(values[index]["accuracy"] or 0), _loss(values[index])))
    pairs = [
        {
            "a": a,
            "b": b,
            "metrics": differences((values[a], values[b]), (draws[a], draws[b])),
            "mcnemar": mcnemar(right[a], right[b], groups),
        }
        for a, b in itertools.combinations(ranking, 2)
    ]
    _correct(pairs)
    comparison = Comparison()
    comparison |= {
        "comparison_version": COMPARISON_VERSION,
        "sentence": "",
        "notes": [],
        "measured": about,
        "rows": {
            "total": len(labels),
            "positives": int(labels.sum()),
            "negatives": int(len(labels) - labels.sum()),
            "groups": int(groups.max()) + 1,
        },
        "label_names": list(label_names),
        "baselines": baselines(labels),
        "classifiers": [
            {
                "mark": _mark(index),
                "name": names[index],
                "rank": ranking.index(index) + 1,
                "metrics": intervals_of(measures[index], values[index], draws[index], groups),
                "confusion": confusion(labels, probabilities[index], thresholds[index]),
            }
            | describe(classifier)
            for index, classifier in enumerate(classifiers)
        ],
        "ranking": ranking,
        "pairs": pairs,
        "correction": {"method": "Holm" if len(pairs) > 1 else None, "comparisons": len(pairs)},
        "differing": _differing(classifiers, examples, labels, groups, probabilities),
    }
    comparison["sentence"] = comparison_sentence(comparison)
    comparison["notes"] = _notes(comparison)
    if bad:
        comparison["notes"].append(bad.note(given))
        comparison["left_out"] = bad.to_json(given)
    return comparison


def mcnemar(
    right_a: npt.NDArray[np.bool_], right_b: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Test whether two classifiers are right equally often, exactly (McNemar, 1947).

    If they are, a row on which one is right and the other wrong is as likely the other way round. Rows of one group are
    turned round together, so that many rows about one picture count as what they are; where every row is a group of its
    own, this is McNemar's test in its binomial form.

    Args:
        right_a: Shape (n,), whether one is right.
        right_b: Shape (n,), whether the other is.
        groups: Shape (n,), numbers of groups; `None` where every row is one of its own.

    Returns:
        `both`, `only_a`, `only_b` and `neither`, counts of rows; and `p_value`, two-sided, 1 where they never differ.
    """
    only_a, only_b = right_a & ~right_b, ~right_a & right_b
    ahead = only_a.astype(np.int64) - only_b
    if groups is not None:
        ahead = np.rint(np.bincount(groups, weights=ahead)).astype(np.int64)
    return {
        "both": int((right_a & right_b).sum()),
        "only_a": int(only_a.sum()),
        "only_b": int(only_b.sum()),
        "neither": int((~right_a & ~right_b).sum()),
        "p_value": _sign_flip(ahead[ahead != 0]),
    }


def _sign_flip(ahead: npt.NDArray[np.int64]) -> float:
    """Return how likely a sum of these integers, each with a random sign, is at least as far from 0 as their own."""
    sizes, counts = np.unique(np.abs(ahead), return_counts=True)
    chances = np.ones(1)  # of each possible sum, from the lowest to the highest
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        flipped = np.zeros(2 * size * count + 1)
        flipped[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = flipped if len(chances) == 1 else np.maximum(fftconvolve(chances, flipped), 0.0)
    most = len(chances) // 2
    far = np.abs(np.arange(-most, most + 1)) >= abs(int(ahead.sum()))
    return min(1.0, float(chances[far].sum()))


def _checked_names(classifiers: Sequence[Classifier], names: Sequence[str] | None) -> list[str]:
    if len(classifiers) < 2:
        raise ConfigError(f"{len(classifiers)} to compare; expected at least two classifiers")
    if names is None:
        return [_mark(index) for index in range(len(classifiers))]
    if len(names) != len(classifiers):
        raise ConfigError(f"{len(names)} names for {len(classifiers)} classifiers; give one name for each")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]!r} names {names.count(twice[0])} classifiers; give each a name of its own")
    return list(names)


def _mark(index: int) -> str:
    """Return the letter for a column: A to Z, then AA, AB, ..."""
    before, last = divmod(index, len(string.ascii_uppercase))
    return (_mark(before - 1) if before else "") + string.ascii_uppercase[last]


def _label_names(classifiers: Sequence[Classifier], names: Sequence[str]) -> tuple[str, str]:
    """Return what the classes are called: as the first classifier that has words for them calls them."""
    first = next((index for index, one in enumerate(classifiers) if one.label_names != ("0", "1")), 0)
    found = classifiers[first].label_names
    for name, classifier in zip(names, classifiers, strict=True):
        if classifier.label_names == found[::-1]:
            raise ConfigError(
                f"class 1 is {found[1]!r} for {names[first]} and {found[0]!r} for {name}; "
                "compare classifiers that were trained with the same class as class 1"
            )
    return found


def _loss(values: dict[str, float | None]) -> float:
    return float("inf") if values["log_loss"] is None else values["log_loss"]


def _probabilities(
    classifiers: Sequence[Classifier], examples: Sequence[Example], bad: BadRows, **reading: Any
) -> list[npt.NDArray[np.float64]]:
    """Return the probabilities of class 1 of each, shape (examples that are not bad,): one pass for each backbone."""
    shared: dict[str, list[int]] = {}
    for index, classifier in enumerate(classifiers):
        shared.setdefault(classifier.backbone.fingerprint, []).append(index)
    found = np.full((len(classifiers), len(examples)), np.nan)
    for indices in shared.values():
        panel = Panel([classifiers[index] for index in indices])
        features = extract_features(examples, panel.backbone, panel.taps, bad=bad, **reading)
        bad.check(len(examples))
        kept = [row for row in range(len(examples)) if row not in bad]
        found[np.ix_(indices, kept)] = panel.probabilities_of(features).T
    return [check_numbers(side[kept]) for side in found]  # without the rows that any backbone could not read


def _correct(pairs: Sequence[dict[str, Any]]) -> None:
    """Correct the p-values for the number of pairs, and let them decide whose accuracy is better."""
    chances = holm([pair["mcnemar"]["p_value"] for pair in pairs])
    for pair, corrected in zip(pairs, chances, strict=True):
        pair["mcnemar"]["p_corrected"] = corrected
        if corrected >= SIGNIFICANT:
            pair["metrics"]["accuracy"]["better"] = None


def _differing(
    classifiers: Sequence[Classifier],
    examples: Sequence[Example],
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    probabilities: Sequence[npt.NDArray[np.float64]],
) -> list[dict[str, Any]]:
    """Return the rows on which answers differ, those with the largest spread of probabilities first."""
    columns = np.stack(probabilities)
    answers = columns >= np.array([classifier.threshold for classifier in classifiers])[:, None]
    rows = np.flatnonzero(answers.any(axis=0) & ~answers.all(axis=0))
    spread = np.ptp(columns[:, rows], axis=0)
    return [
        {
            "row": row,
            "id": examples[row].id,
            "text": examples[row].text,
            "image": picture_name(examples[row]),
            "label": int(labels[row]),
            "group": int(groups[row]),
            "probabilities": columns[:, row].tolist(),
            "labels": answers[:, row].astype(int).tolist(),
            "decisions": [
                classifier.decision_of(float(side)).decision
                for classifier, side in zip(classifiers, columns[:, row], strict=True)
            ],
        }
        for row in rows[np.argsort(-spread, kind="stable")].tolist()
    ]


def _notes(comparison: dict[str, Any]) -> list[str]:
    rows, pairs = comparison["rows"], comparison["correction"]["comparisons"]
    notes = []
    if pairs > 1:
        notes.append(
            f"p-values are corrected for {pairs} comparisons by Holm's method; each interval is of 95 % by itself"
        )
    if rows["groups"] < rows["total"]:
        notes.append(
            f"{rows['total']:,} rows in {rows['groups']:,} groups that share a picture, text or group: intervals "
            "and tests take each group as a whole"
        )
    others = {tuple(one["label_names"]) for one in comparison["classifiers"]} - {("0", "1")}
    if len(others) > 1:
        notes.append(f"the classifiers name their classes differently: {' | '.join(', '.join(one) for one in others)}")
    return notes
