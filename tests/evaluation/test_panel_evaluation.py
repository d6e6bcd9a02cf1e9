"""Figures of several labels and of classes, against scikit-learn's, their intervals, and what an evaluation says."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from qwen_vl_classifier.evaluation.intervals import bootstrap
from qwen_vl_classifier.evaluation.panels.class_figures import ClassMeasure, class_figures
from qwen_vl_classifier.evaluation.panels.label_figures import MISSING, measure_labels
from qwen_vl_classifier.evaluation.panels.panel_checks import auroc_influence


def some_labels(rows=120, labels=3, missing=0.2, seed=0):
    """Make labels with gaps, probabilities that tell something of them, and groups of two rows."""
    rng = np.random.default_rng(seed)
    made = (rng.random((rows, labels)) < np.linspace(0.2, 0.6, labels)).astype(np.int64)
    probabilities = np.clip(0.25 + 0.5 * made + rng.normal(0, 0.25, made.shape), 0.01, 0.99)
    made[rng.random(made.shape) < missing] = MISSING
    return made, probabilities, np.arange(rows) // 2


def some_classes(rows=150, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    known = rng.integers(0, classes, rows)
    likely = np.exp(rng.normal(0, 1, (rows, classes)) + 2 * (known[:, None] == np.arange(classes)))
    return known, likely / likely.sum(axis=1, keepdims=True), np.arange(rows)


def test_each_label_and_their_mean_are_those_of_scikit_learn():
    labels, probabilities, groups = some_labels()
    thresholds = [0.3, 0.5, 0.6]
    found = measure_labels(labels, probabilities, thresholds, groups, resamples=50)
    expected = []
    for column, threshold in enumerate(thresholds):
        known = labels[:, column] != MISSING
        own, likely = labels[known, column], probabilities[known, column]
        answers = likely >= threshold
        expected.append(
            {
                "accuracy": sklearn_metrics.accuracy_score(own, answers),
                "f1_1": sklearn_metrics.f1_score(own, answers),
                "auroc": sklearn_metrics.roc_auc_score(own, likely),
                "average_precision": sklearn_metrics.average_precision_score(own, likely),
                "log_loss": sklearn_metrics.log_loss(own, likely),
            }
        )
        entry = found.labels[column]
        assert entry["rows"]["labelled"] == known.sum()
        for name, value in expected[-1].items():
            assert entry["metrics"][name]["value"] == pytest.approx(value), name
            assert entry["metrics"][name]["low"] < value < entry["metrics"][name]["high"], name
        false_positive = sklearn_metrics.confusion_matrix(own, answers)[0, 1]
        assert entry["confusion"]["false_positive"] == false_positive
    for name in expected[0]:
        mean = found.macro["metrics"][name]
        assert mean["value"] == pytest.approx(np.mean([one[name] for one in expected]))
        assert mean["labels"] == 3
        widths = [one["metrics"][name]["high"] - one["metrics"][name]["low"] for one in found.labels]
        assert 0 < mean["high"] - mean["low"] < np.mean(widths), "a mean of labels is known better than one of them"


def test_shares_of_right_answers_and_of_rows_count_what_is_known():
    labels, probabilities, groups = some_labels()
    found = measure_labels(labels, probabilities, [0.5] * 3, groups, resamples=50).shares
    known = labels != MISSING
    right = (probabilities >= 0.5) == (labels == 1)
    assert found["micro_accuracy"]["value"] == pytest.approx(right[known].mean())
    assert found["micro_accuracy"]["count"] == known.sum()
    complete = known.all(axis=1)
    assert found["exact_match"]["value"] == pytest.approx(right[complete].all(axis=1).mean())
    assert found["exact_match"]["count"] == complete.sum()
    assert found["exact_match"]["majority"] < found["exact_match"]["low"]


def test_labels_without_rows_or_of_one_class_are_left_out_of_the_means_they_lack():
    labels, probabilities, groups = some_labels()
    labels[:, 0] = MISSING
    labels[:, 1] = np.where(labels[:, 1] == MISSING, MISSING, 1)
    found = measure_labels(labels, probabilities, [0.5] * 3, groups, resamples=50)
    assert found.labels[0]["metrics"]["accuracy"] == {"value": None, "low": None, "high": None}
    assert found.labels[0]["skill"] is None
    assert found.macro["metrics"]["accuracy"]["labels"] == 2
    assert found.macro["metrics"]["auroc"]["labels"] == 1
    assert found.macro["metrics"]["auroc"]["value"] == found.labels[2]["metrics"]["auroc"]["value"]


def test_a_mean_of_perfect_labels_is_no_proof_of_perfection():
    labels = np.tile([[0, 1, 1], [1, 0, 1], [1, 1, 0]], (10, 1))
    found = measure_labels(labels, labels * 0.8 + 0.1, [0.5] * 3, np.arange(30), resamples=50)
    for name in ("accuracy", "auroc", "f1_1"):
        assert found.macro["metrics"][name]["value"] == found.macro["metrics"][name]["high"] == 1
        assert found.macro["metrics"][name]["low"] < 0.95, name
    assert found.shares["exact_match"]["low"] < 0.95


def test_classes_are_measured_as_by_scikit_learn():
    classes, probabilities, groups = some_classes()
    names = ["ash", "birch", "cedar", "elm"]
    answers = probabilities.argmax(axis=1)
    measure = ClassMeasure(classes, probabilities)
    one_hot = (classes[:, None] == np.arange(4)).astype(np.int64)
    figures = measure_labels(
        one_hot,
        probabilities,
        [0.5] * 4,
        groups,
        answered=answers[:, None] == np.arange(4),
        further=[measure],
        resamples=50,
    )
    macro = figures.macro["metrics"]
    found = class_figures(measure, *figures.draws, names, groups, rows=150, macro=macro)
    assert found["confusion"] == sklearn_metrics.confusion_matrix(classes, answers).tolist()
    assert found["metrics"]["accuracy"]["value"] == sklearn_metrics.accuracy_score(classes, answers)
    assert found["metrics"]["log_loss"]["value"] == pytest.approx(sklearn_metrics.log_loss(classes, probabilities))
    assert macro["f1_1"]["value"] == pytest.approx(sklearn_metrics.f1_score(classes, answers, average="macro"))
    assert macro["auroc"]["value"] == pytest.approx(
        sklearn_metrics.roc_auc_score(classes, probabilities, multi_class="ovr")
    )
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(classes, answers)
    for column, label in enumerate(figures.labels):
        values = [label["metrics"][name]["value"] for name in ("precision_1", "recall_1", "f1_1")]
        assert values == pytest.approx([precision[column], recall[column], f1[column]])
        assert label["rows"]["positives"] == support[column]
    always = np.full(150, np.bincount(classes).argmax())
    assert found["baselines"]["majority"] == {
        "class": names[always[0]],
        "accuracy": sklearn_metrics.accuracy_score(classes, always),
        "macro_f1": pytest.approx(sklearn_metrics.f1_score(classes, always, average="macro")),
    }
    worst = found["confused"][0]
    table = np.array(found["confusion"])
    assert worst["count"] == (table - np.diag(np.diag(table))).max()
    assert {names[classes[row]] for row in worst["rows"]} == {worst["label"]}
    assert {names[answers[row]] for row in worst["rows"]} == {worst["answer"]}


def test_rows_of_no_known_class_do_not_count():
    classes, probabilities, groups = some_classes()
    classes[::3] = MISSING
    measure = ClassMeasure(classes, probabilities)
    (draws,) = bootstrap([measure], groups, resamples=50)
    known = classes != MISSING
    value = measure(np.ones((1, 150)))["accuracy"][0]
    assert value == (probabilities[known].argmax(axis=1) == classes[known]).mean()
    assert np.isfinite(draws["log_loss"]).all()


def test_the_drop_of_a_mean_has_the_width_that_resampling_gives_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    probabilities = np.round(np.clip(0.3 * labels + rng.random(300) * 0.7, 0, 1), 2)  # with ties
    area, influence = auroc_influence(labels, probabilities)
    assert area == pytest.approx(sklearn_metrics.roc_auc_score(labels, probabilities))
    assert influence.sum() == pytest.approx(0)
    drawn = [
        sklearn_metrics.roc_auc_score(labels[rows], probabilities[rows]) for rows in rng.integers(0, 300, (200, 300))
    ]
    assert np.sqrt((influence**2).sum()) == pytest.approx(np.std(drawn), rel=0.2)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["accuracy", "f1_1", "auroc", "average_precision", "log_loss"])
def test_intervals_of_means_cover(name):
    """Of 200 samples of 75 groups of two rows with labels that go together, nearly 95 % cover the figure of all."""

    def sample(groups, seed):
        rng = np.random.default_rng(seed)
        hard = np.repeat(rng.normal(0, 1, groups), 2)[:, None]
        made = (rng.random((2 * groups, 5)) < np.linspace(0.2, 0.5, 5)).astype(np.int64)
        margins = (2 * made - 1) * (1.2 - 0.7 * hard) + rng.normal(0, 1, made.shape)
        made[rng.random(made.shape) < 0.2] = MISSING
        return made, 1 / (1 + np.exp(-margins)), np.repeat(np.arange(groups), 2)

    truth = measure_labels(*sample(50_000, 1)[:2], [0.5] * 5, np.zeros(100_000, dtype=int), resamples=1)
    value = truth.macro["metrics"][name]["value"]
    covered = 0
    for seed in range(200):
        labels, probabilities, groups = sample(75, 100 + seed)
        found = measure_labels(labels, probabilities, [0.5] * 5, groups, resamples=300, seed=seed)
        mean = found.macro["metrics"][name]
        covered += mean["low"] <= value <= mean["high"]
    assert covered >= 180
