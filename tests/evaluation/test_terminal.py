"""The table: 80 columns whatever the data, every number in its place, hostile text inert."""

import copy
import unicodedata

import pytest

from qwen_vl_classifier import Example
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.evaluation.compare import compare
from qwen_vl_classifier.evaluation.evaluation import evaluate
from qwen_vl_classifier.evaluation.metrics import METRICS
from qwen_vl_classifier.evaluation.terminal import comparison_table, evaluation_table


@pytest.fixture(scope="module")
def evaluation(tiny_classifier, scene_rows):
    return evaluate(
        tiny_classifier, scene_rows[:24], config=EvaluateConfig(resamples=100, slice_rows=3, slice_by="kind")
    )


def width(table):
    return max(map(len, table.splitlines()))


def test_every_metric_is_named_with_the_class_that_it_is_of(evaluation):
    lines = evaluation_table(evaluation).splitlines()
    assert sum("[" in line or "n/a" in line for line in lines) >= len(METRICS)
    assert any(line.startswith("precision of class 1  ") for line in lines)
    named = copy.deepcopy(evaluation)
    named["classifier"]["label_names"] = ["dog", "cat that has a long name"]
    table = evaluation_table(named)
    assert width(table) <= 80
    assert "\nrecall of dog  " in table
    assert "\nF1 of cat that has…  " in table


def test_the_table_shows_values_intervals_and_baselines(evaluation):
    table = evaluation_table(evaluation)
    assert width(table) <= 80
    assert table.startswith("Right on ")
    rows = evaluation["rows"]
    counts = f"({rows['negatives']} class 0, {rows['positives']} class 1)"
    assert f"Measured on the given rows {counts}." in table
    named = copy.deepcopy(evaluation)
    named["measured"] |= {"classifier": "probe", "data": "test.csv"}
    assert f"\nMeasured: probe on test.csv {counts}.\n" in evaluation_table(named)
    (line,) = [line for line in table.splitlines() if line.startswith("AUROC")]
    entry = evaluation["metrics"]["auroc"]
    assert line.split() == [
        "AUROC",
        f"{entry['value']:.3f}",
        f"[{entry['low']:.3f},",
        f"{entry['high']:.3f}]",
        "0.500",
        "0.500",
    ]
    assert [line.split()[:3] for line in table.splitlines() if line.startswith("other")] == [
        ["other", kind, f"{evaluation['checks'][name]['auroc']['drop']:+.3f}"]
        for kind, name in (("pictures", "images_permuted"), ("texts", "texts_permuted"))
    ]
    for note in evaluation["notes"]:
        assert note.split()[0] in table


def test_large_counts_and_long_names_fit(evaluation):
    changed = copy.deepcopy(evaluation)
    changed["confusion"] = dict.fromkeys(changed["confusion"], 123_456_789)
    changed["slices"] = [
        {
            "name": "a column with a long name",
            "value": "word " * 30,
            "rows": 123_456,
            "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6},
            "p_value": 1.234e-120,
            "worse": True,
        }
    ] * 9
    changed["notes"] = ["word " * 60, "x" * 200]
    table = evaluation_table(changed)
    assert width(table) <= 80
    assert "123,456,789" in table
    assert table.count("a column with") == 5


def test_what_was_not_checked_is_said(tiny_classifier, scene_rows):
    quick = evaluate(tiny_classifier, scene_rows[:6], config=EvaluateConfig(resamples=10, checks=False))
    assert "- not checked whether it uses pictures and texts: switched off" in evaluation_table(quick)
    texts = [Example(None, row.text, row.label) for row in scene_rows[:6]]
    table = evaluation_table(evaluate(tiny_classifier, texts, config=EvaluateConfig(resamples=10)))
    assert "no row has a picture" in table
    assert width(table) <= 80


def test_control_characters_of_strangers_do_not_reach_the_terminal(evaluation):
    changed = copy.deepcopy(evaluation)
    changed["notes"] = ["kind\x1b[2J\x07: left out"]
    changed["slices"][0] |= {"name": "ki\x1b]0;nd", "value": "\x9b31m\rred"}
    table = evaluation_table(changed)
    assert all(unicodedata.category(character) != "Cc" for character in table.replace("\n", ""))


@pytest.fixture(scope="module")
def comparison(tiny_classifier, tiny_backbone, scene_rows):
    other = copy.copy(tiny_classifier)
    other.threshold = 1.1  # answers no
    return compare(
        [tiny_classifier, other],
        scene_rows[:12],
        names=("/a/long/path/" * 20, "b"),
        config=EvaluateConfig(resamples=20),
    )


def test_a_comparison_fits_and_names_the_better(comparison):
    found = copy.deepcopy(comparison)
    (pair,) = found["pairs"]
    marks = {side: found["classifiers"][pair[side]]["mark"] for side in ("a", "b")}
    pair["metrics"]["auroc"] |= {"difference": -0.5, "low": -0.75, "high": -0.25, "better": "b"}
    table = comparison_table(found)
    assert width(table) <= 80
    (line,) = [line for line in table.splitlines() if line.startswith("AUROC")]
    assert line.split()[-4:] == ["-0.500", "[-0.750,", "-0.250]", marks["b"]]
    (line,) = [line for line in table.splitlines() if line.startswith("accuracy  ")]
    assert line.split()[-1] == "-"
    (line,) = [line for line in table.splitlines() if " against " in line and ":" in line]
    test = pair["mcnemar"]
    assert f"{test['only_a']} : {test['only_b']}" in line
    assert f"{test['p_corrected']:.3f}" in line


def test_rows_on_which_answers_differ_are_shown_with_wrong_answers_marked(comparison):
    table = comparison_table(comparison)
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("answers differ on"))
    assert f"answers differ on {len(comparison['differing'])} of 12 rows" in table
    row = comparison["differing"][0]
    line = next(line for line in lines[start:] if line.split()[:1] == [str(row["row"])])
    assert line.count("x") == 1  # of two answers that differ, one is wrong
    same = copy.deepcopy(comparison)
    same["differing"] = []
    assert "All give the same answer to every row." in comparison_table(same)


def test_many_classifiers_fit(comparison):
    many = copy.deepcopy(comparison)
    first, *_ = many["classifiers"]
    many["classifiers"] = [first | {"mark": mark, "name": f"{mark} {'n' * 60}"} for mark in "ABCDEFGH"]
    many["ranking"] = [*range(8)]
    (pair,) = many["pairs"]
    pair["mcnemar"] |= {"only_a": 123_456, "only_b": 123_456, "p_corrected": 1e-9}
    many["pairs"] = [pair | {"a": 0, "b": 1}] * 28
    for row in many["differing"]:
        row |= {"probabilities": [0.5] * 8, "labels": [0, 1] * 4, "id": "i" * 90}
    table = comparison_table(many)
    assert width(table) <= 80
    assert "and 18 more pairs" in table
    assert "of the 5 most accurate" in table
    assert "<0.001" in table
