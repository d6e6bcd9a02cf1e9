"""Slices: how rows are cut, what is left out, what is shown to be worse and how often that is a false alarm."""

import numpy as np
import pytest
from scipy.stats import fisher_exact

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.slices import Slicing, design_effect, holm, measure_slices, slices_of_rows, slicings
from qwen_vl_classifier.training.uncertainty import wilson


def examples_with(values, name="kind", image=None):
    return [Example(image, "text", 1, fields={name: value}) for value in values]


def cut(examples, columns, *, fewest):
    """Cut rows whose pictures are not looked at."""
    return slicings(examples, columns, fewest=fewest, sizes=[[]] * len(examples))


def parts(found, name):
    (slicing,) = [slicing for slicing in found if slicing.name == name]
    return {value: np.flatnonzero(rows).tolist() for value, rows in slicing.parts}, slicing.note


def test_a_column_of_words_is_cut_by_its_values():
    found, note = parts(cut(examples_with(["a", "b", "a", None, "b", "a"]), ["kind"], fewest=1), "kind")
    assert found == {"a": [0, 2, 5], "b": [1, 4], "no value": [3]}
    assert note == ""


def test_small_and_many_values_are_left_out_and_said():
    found, note = parts(cut(examples_with(["a"] * 5 + ["b"]), ["kind"], fewest=5), "kind")
    assert list(found) == ["a"]
    assert note.startswith("kind: 1 of 2 values (1 row) left out")
    values = [f"value {number // 2}" for number in range(60)]
    found, note = parts(cut(examples_with(values), ["kind"], fewest=2), "kind")
    assert len(found) == 20
    assert "10 of 30 values (20 rows)" in note


def test_a_column_of_all_different_words_is_soft():
    found, note = parts(cut(examples_with([f"id {number}" for number in range(50)]), ["kind"], fewest=2), "kind")
    assert found == {}
    assert "50 of 50 values" in note


def test_many_numbers_are_cut_at_quartiles():
    values = [*map(float, range(100)), None, float("nan")]
    found, _ = parts(cut(examples_with(values, "score"), ["score"], fewest=2), "score")
    assert {value: len(rows) for value, rows in found.items()} == {
        "0 to 25": 26,
        "26 to 50": 25,
        "51 to 74": 24,
        "75 to 99": 25,
        "no value": 2,
    }


def test_few_numbers_are_values():
    found, _ = parts(cut(examples_with([1, 2, 1, 2], "stars"), ["stars"], fewest=1), "stars")
    assert found == {"1": [0, 2], "2": [1, 3]}


def test_sizes_and_lengths_are_cut_by_themselves():
    examples = [Example(None, "x" * (10 * number + 1), 1) for number in range(5)]
    squares = [[(side, side)] for side in (8, 16, 32, 64)]
    found = slicings(examples, [], fewest=1, sizes=[*squares, []])
    sizes, _ = parts(found, "picture size")
    assert sizes["no picture"] == [4]
    assert sorted(row for rows in sizes.values() for row in rows) == [0, 1, 2, 3, 4]
    assert any("4,096 pixels" in value for value in sizes)
    lengths, _ = parts(found, "text length")
    assert sorted(row for rows in lengths.values() for row in rows) == [0, 1, 2, 3, 4]


def test_what_does_not_vary_is_not_cut():
    assert cut([Example(None, "same", 1)] * 8, [], fewest=1) == []


def test_a_column_that_is_nowhere_is_refused():
    with pytest.raises(DataError, match=r"no row has a column 'sort' to slice by; give one of kind$"):
        cut(examples_with(["a"]), ["sort"], fewest=1)
    with pytest.raises(DataError, match="nor any other"):
        cut([Example(None, "x", 1)], ["sort"], fewest=1)


def test_a_bad_slice_is_found_and_measured():
    rng = np.random.default_rng(0)
    slow = np.arange(400) < 100
    right = rng.random(400) < np.where(slow, 0.6, 0.9)
    found = measure_slices(
        [Slicing("kind", [("slow", slow), ("fast", ~slow)])], right, np.arange(400) % 2 == 0, np.arange(400)
    )
    assert [entry["value"] for entry in found] == ["slow", "fast"]
    slow_entry, fast_entry = found
    assert slow_entry["worse"]
    assert not fast_entry["worse"]
    assert (slow_entry["rows"], slow_entry["positives"]) == (100, 50)
    hits, others = int(right[slow].sum()), int(right[~slow].sum())
    assert slow_entry["accuracy"]["value"] == hits / 100
    assert (slow_entry["accuracy"]["low"], slow_entry["accuracy"]["high"]) == pytest.approx(wilson(hits, 100))
    assert slow_entry["rest"] == others / 300
    alone = fisher_exact([[hits, 100 - hits], [others, 300 - others]]).pvalue
    assert slow_entry["p_value"] == pytest.approx(2 * alone)  # of two slices


def test_a_slice_of_all_rows_has_nothing_to_be_worse_than():
    everyone = np.ones(5, dtype=bool)
    (entry,) = measure_slices([Slicing("kind", [("a", everyone)])], everyone, everyone, np.arange(5))
    assert entry["rest"] is None
    assert (entry["p_value"], entry["worse"]) == (1.0, False)


def test_rows_know_their_slices():
    even, low = np.arange(6) % 2 == 0, np.arange(6) < 2
    found = [Slicing("parity", [("odd", ~even), ("even", even)]), Slicing("size", [("low", low)])]
    measured = measure_slices(found, even, even, np.arange(6))
    assert [entry["value"] for entry in measured] == ["odd", "low", "even"]
    assert slices_of_rows(found, measured, 6) == [[1, 2], [0, 1], [2], [0], [2], [0]]


def test_looking_at_many_slices_raises_few_false_alarms():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        right = np.repeat(rng.random(60) < 0.8, 4)  # rows of a picture are right or wrong together
        kinds = np.repeat(rng.integers(0, 6, 60), 4)
        cut = Slicing("kind", [(str(kind), kinds == kind) for kind in range(6) if (kinds == kind).any()])
        found = measure_slices([cut], right, right, np.repeat(np.arange(60), 4))
        alarms += any(entry["worse"] for entry in found)
    assert alarms <= 10


def test_rows_that_belong_together_count_for_less():
    rng = np.random.default_rng(0)
    together = np.repeat(rng.random(50) < 0.7, 4)
    groups = np.repeat(np.arange(50), 4)
    assert design_effect(together, groups) == pytest.approx(4, rel=0.05)
    assert design_effect(rng.random(200) < 0.7, np.arange(200)) == pytest.approx(1)
    assert design_effect(np.ones(200, dtype=bool), groups) == 4
    assert design_effect(np.ones(7, dtype=bool), np.zeros(7, dtype=np.int64)) == 7


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
