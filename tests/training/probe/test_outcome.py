"""What `train` prints: the verdict first, the choice in words, a short table with the baselines, 80 columns."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from qwen_vl_classifier import Tap
from qwen_vl_classifier.training.probe.estimate import HELD_OUT
from qwen_vl_classifier.training.probe.outcome import choice_text, layer_words, objective_words, verdict_text
from qwen_vl_classifier.training.probe.result import TrainResult, table_lines


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def row(tap: str, head: str, **changes: Any) -> dict[str, Any]:
    scores = {"log_loss": 0.1, "log_loss_se": 0.01, "accuracy": 0.9, "accuracy_se": 0.01, "auroc": 0.95}
    return {"tap": tap, "head": head, "l2": 0.000316228, "epochs": None} | scores | changes


def estimate(**changes: Any) -> dict[str, Any]:
    return {
        "method": "bootstrap bias corrected cross-validation",
        "rows": 400,
        "groups": 400,
        "few": False,
        "samples": 500,
        "majority_accuracy": 0.69,
        "majority_class": 0,
        "accuracy": interval(0.79, 0.76, 0.81),
        "log_loss": interval(0.45, 0.4, 0.5),
        "auroc": interval(0.85, 0.8, 0.9),
        "ece": interval(0.02, 0.0, 0.05),
        "stands_for": "new pictures, the same text",
    } | changes


@pytest.fixture
def classifier(tiny_classifier):
    made = copy.copy(tiny_classifier)
    made.tap, made.label_names = Tap(2, "text"), ("mixed", "matching")
    made.training = {
        "training_rows": 400,
        "folds": 5,
        "estimate": estimate(),
        "calibration": {"method": "temperature", "log_loss_before": 0.4, "log_loss_after": 0.39},
        "threshold": {"objective": "accuracy", "threshold": 0.5},
        "notes": ["a note"],
        "table": [row("text:2", "linear"), row("last:-1", "zero-shot", l2=None)],
        "data": {"pictures": 400, "texts": 1, "alike": {"pairs": 0}},
    }
    return made


def verdict(classifier, **changes: Any) -> str:
    classifier.training["estimate"] = estimate(**changes)
    return " ".join(verdict_text(classifier).split())


def test_the_verdict_comes_first_with_the_class_by_name(classifier):
    assert verdict(classifier).startswith(
        'Learned something: accuracy 0.790 (0.760 to 0.810) on new rows, against 0.690 for always "mixed". log '
    )
    classifier.label_names = ("0", "1")
    assert "for always class 0." in verdict(classifier)
    del classifier.training["estimate"]["majority_class"]  # as in records of earlier versions
    assert "for always the more frequent class." in " ".join(verdict_text(classifier).split())


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        (
            {"accuracy": interval(0.71, 0.68, 0.74), "auroc": interval(0.6, 0.49, 0.7)},
            "No better than guessing, as far",
        ),
        ({"accuracy": interval(0.71, 0.68, 0.74)}, "Learned something: it ranks the classes better than chance (AUROC"),
        (
            {"accuracy": interval(0.6, 0.5, 0.7), "log_loss": interval(0.63, 0.5, 0.7)},
            "No better than guessing, as far as these rows show",
        ),
        (
            {"samples": 0, "rows": 9, "groups": 3},
            "Unknown whether it learned something: 9 rows in 3 groups are too few",
        ),
    ],
)
def test_what_is_not_shown_is_not_claimed(classifier, changes, start):
    assert verdict(classifier, **changes).startswith(start)


def test_how_it_was_measured_is_told(classifier):
    assert "by bootstrap bias corrected cross-validation, 400 rows in 400 groups" in verdict(classifier)
    assert "on 120 held-out rows in 100 groups" in verdict(classifier, method=HELD_OUT, rows=120, groups=100)


def test_few_rows_are_told_of_and_an_untrained_winner_is_no_learning(classifier):
    assert "400 rows in 400 groups: too few to say how good it is" in verdict(classifier, few=True)
    classifier.training["table"].reverse()
    assert verdict(classifier).startswith("Training did not beat the model's own answer (zero-shot)")


def test_the_choice_is_in_words(classifier):
    words = " ".join(choice_text(classifier).split())
    assert (
        "logistic regression on the average over the tokens of the text after layer 2 of 6 (linear at text:2)" in words
    )
    assert "with the lowest log loss of 2 combinations" in words
    assert 'Threshold: "matching" from a probability of 0.500 on, chosen for the most right answers.' in words
    assert "Data: 400 rows: 400 distinct pictures, 1 distinct text." in words
    assert words.endswith("Note: a note")


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("recall>=0.95", "chosen for a recall of at least 0.95"),
        ("cost=5:1", "chosen for the lowest cost, where a miss costs 5 and a false alarm 1"),
        ("set by hand", "set by hand"),
        ("f1", "chosen for the highest F1"),
    ],
)
def test_objectives_in_words(objective, words):
    assert objective_words(objective) == words


def test_layers_in_words():
    assert layer_words(Tap(-1, "last"), 36) == "after the last layer and the final norm"
    assert layer_words(Tap(24, "last", normed=True), 36) == "after layer 24 of 36 and the final norm"


def test_the_table_is_short_and_keeps_the_baselines(classifier):
    table = [row(f"image:{layer}:normed", "linear") for layer in range(10, 40)]
    table += [row("last:-1", "calibrated", l2=None), row("last:-1", "zero-shot", l2=None)]
    lines = table_lines(table)
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 6 + 2 + 1
    assert [line.split()[1] for line in lines[-3:-1]] == ["calibrated", "zero-shot"]
    assert lines[-1] == "and 24 more in the training record (classifier.json)"
    result = TrainResult(classifier, table, 0, estimate())
    text = str(result)
    assert text.index("Learned something") < text.index("Chosen:") < text.index("log loss ± s.e.")
    assert max(map(len, text.splitlines())) <= 80
