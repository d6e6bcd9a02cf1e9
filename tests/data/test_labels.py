"""Labels: one rule for every type and format, never a class in silence, and names of classes from the data's words."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest
import torch

from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import class_names_of, label_text
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import ConfigError, DataError


def rows(*labels) -> list[dict]:
    return [{"image": None, "text": "a claim", "label": label} for label in labels]


def labels(source, **options) -> list:
    return [example.label for example in load_examples(source, **options)]


def refusal(source, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(source, **options)
    return str(caught.value)


def written(folder, form: str, values: list):
    """Write labels as a file of a format; return its path."""
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in rows(*values)))
    elif form == "csv":
        path.write_text("image,text,label\n" + "".join(f",a claim,{value}\n" for value in values))
    else:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table(
            {"image": pyarrow.nulls(len(values), pyarrow.string()), "text": ["a claim"] * len(values)}
        )
        parquet.write_table(table.append_column("label", pyarrow.array(values)), path)
    return path


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((value, 0) for value in ("False", "FALSE", " false ", "0", " 0.0\t", "0.", Decimal(0), Decimal("0.00"))),
        *((value, 1) for value in ("True", "TRUE", " true ", "1", "+1", "1.000", Decimal(1), Decimal("1.0"))),
        *(
            (value, 1)
            for value in (np.array([1]), np.array([[True]]), torch.tensor(1), torch.tensor([1.0]), np.str_("1"))
        ),
        *((value, None) for value in (Decimal("NaN"), np.float32("nan"), torch.tensor(float("nan")))),
    ],
)
def test_truth_values_of_every_type(value, label):
    (example,) = load_examples(rows(value))
    assert example.label == label
    assert type(example.label) in (int, type(None))
    assert example.label_text is None


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (["True", "False"], "csv"),
        ([True, False], "jsonl"),
        ([True, False], "parquet"),
        ([Decimal(1), Decimal(0)], "parquet"),
        ([1.0, 0.0], "csv"),
    ],
)
def test_truth_values_of_every_format(tmp_path, values, form):
    assert labels(written(tmp_path, form, values)) == [1, 0]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "positive", "expected"),
    [
        (["yes", "no", "yes ", " yes"], "yes", [1, 0, 1, 1]),
        (["yes", "no"], " yes ", [1, 0]),
        ([1, 0, 2], "1", [1, 0, 0]),
        ([3.0, 7.0], "3", [1, 0]),
        ([3, 7], "3.0", [1, 0]),
        ([True, False], "true", [1, 0]),
        ([True, False], "False", [0, 1]),
        ([0, 1], "0", [1, 0]),
        (["caf\u00e9", "x"], "cafe\u0301", [1, 0]),
        (["01", "1"], "1", [0, 1]),
    ],
)
def test_labels_are_compared_as_text(tmp_path, form, values, positive, expected):
    assert labels(written(tmp_path, form, values), positive=positive) == expected


def test_labels_with_names():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["fine", "broken", "odd"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["x"] * 4, "label": [1, 0, 2, -1]}, features=features)
    dataset = dataset.add_column("image", [None] * 4)
    assert labels(dataset, positive="broken") == [1, 0, 0, None]
    assert labels(dataset, class_names=("not broken", "broken")) == [1, 0, 0, None]
    assert "label is 'odd', expected 0 or 1, or positive= to say which word counts as 1" in refusal(dataset)
    assert labels(dataset.to_iterable_dataset(), positive="broken") == [1, 0, 0, None]
    two = load_examples(dataset.select([0, 1]))
    assert [(one.label, one.label_text) for one in two] == [(1, "broken"), (0, "fine")]
    assert "'fine' (1 row), 'odd' (1 row)" in refusal(dataset, positive="Broke")


class TestWrongPositive:
    def test_labels_that_there_are_are_listed_with_counts(self):
        found = refusal(rows("no", "yes", "no", " yes", "no"), positive="Yes")
        assert found == (
            "positive='Yes', but no row of the list has that label; expected one of its labels: 'no' (3 rows), 'yes' "
            "(2 rows); give the one that counts as 1 with positive=; did you mean 'yes'?"
        )

    def test_a_misspelt_label_is_suggested(self):
        assert refusal(rows("no", "yes"), positive="yess").endswith("did you mean 'yes'?")
        assert "label is 'yess', expected 'no' or 'yes' (or 0 or 1); did you mean 'yes'?" in refusal(
            rows("no", "yes", "yess"), class_names=("no", "yes")
        )

    def test_many_labels_are_cut_short(self):
        found = refusal(rows(*range(2000)), positive="cat")
        assert "'0' (1 row)" in found
        assert "and 991 more" in found
        assert len(found) < 600

    @pytest.mark.parametrize("positive", ["", "  "])
    def test_a_blank_one_is_refused(self, positive):
        with pytest.raises(ConfigError, match="positive= is blank"):
            load_examples(rows("yes"), positive=positive)

    def test_rows_without_labels_say_nothing(self):
        assert labels(rows(None, None), positive="yes") == [None, None]

    def test_a_label_after_very_many_others_is_found(self):
        assert sum(labels(rows(*range(2000), "cat"), positive="cat")) == 1

    def test_another_case_is_never_taken_for_class_0(self):
        found = refusal(rows("yes", "no", "Yes", "YES"), positive="yes")
        assert "differ only in case or spacing: 'YES' (1 row), 'Yes' (1 row), 'yes' (1 row)" in found

    @pytest.mark.parametrize("value", ["", " ", ["yes"], {"a": 1}])
    def test_what_is_no_label_is_never_taken_for_class_0(self, value):
        assert "row 2: label is " in refusal(rows("yes", value), positive="yes")

    def test_every_verb_says_so(self, tmp_path, capsys):
        data = written(tmp_path, "csv", ["yes", "no"] * 8)
        assert main(["train", str(data), "--out", str(tmp_path / "out"), "--positive", "Yes"]) == 2
        assert "--positive Yes, but no row of" in capsys.readouterr().err


def test_words_without_a_positive_are_listed():
    found = refusal(rows("cat", "dog", "cat"))
    assert "row 1: label is 'cat', expected 0 or 1, or positive= to say which word counts as 1" in found
    assert found.splitlines()[-1] == "Labels that were read: 'cat' (2 rows), 'dog' (1 row)."


class TestClassNames:
    NAMES = ("normal", "pneumonia")

    def test_words_and_classes(self):
        values = ("pneumonia", "normal", " normal", 1, 0, "True", None)
        assert labels(rows(*values), class_names=self.NAMES) == [1, 0, 0, 1, 0, 1, None]
        assert labels(rows("normal"), class_names=self.NAMES) == [0]

    def test_unknown_words_are_refused_with_both_sides(self):
        found = refusal(rows("pneumonia", "covid"), class_names=self.NAMES)
        assert "row 2: label is 'covid', expected 'normal' or 'pneumonia' (or 0 or 1)" in found
        assert "Labels that were read: 'covid' (1 row), 'pneumonia' (1 row)." in found

    def test_one_against_the_rest(self):
        names = ("not pneumonia", "pneumonia")
        assert labels(rows("pneumonia", "covid", "normal", 1), class_names=names) == [1, 0, 0, 1]
        assert labels(rows(1, 0), class_names=names) == [1, 0]
        found = refusal(rows("cat", "Pneumonia"), class_names=names)
        assert "class 1 is called 'pneumonia', but no row of the list has that label" in found
        assert "did you mean 'Pneumonia'?" in found

    def test_classes_that_are_called_by_numbers(self):
        assert labels(rows(0, 1), class_names=("1", "0")) == [1, 0]
        assert labels(rows(3, 1, 0), class_names=("not 3", "3")) == [1, 0, 0]
        assert "label is 1, expected '2' or '3'" in refusal(rows(3, 1), class_names=("2", "3"))
        assert labels(rows(1, "false", True), class_names=("false", "true")) == [1, 0, 1]

    def test_a_positive_of_its_own_goes_before(self):
        assert labels(rows("pneumonie", "normal"), class_names=self.NAMES, positive="pneumonie") == [1, 0]
        with pytest.raises(ConfigError, match="but class 0 is called 'normal'"):
            load_examples(rows("normal"), class_names=self.NAMES, positive="normal")

    def test_examples_keep_their_class(self):
        examples = [Example(None, "a", 1), Example(None, "b", 0, label_text="covid")]
        for options in ({"positive": "yes"}, {"class_names": ("1", "0")}):
            read = load_examples(examples, **options)
            assert [(one.label, one.label_text) for one in read] == [(1, None), (0, "covid")]


@pytest.mark.parametrize(
    ("values", "options", "names"),
    [
        (("pneumonia", "normal"), {"positive": "pneumonia"}, ("normal", "pneumonia")),
        (("pneumonia", "normal", "covid"), {"positive": "pneumonia"}, ("not pneumonia", "pneumonia")),
        (("pneumonia",), {"positive": "pneumonia"}, ("not pneumonia", "pneumonia")),
        ((1, 0), {"positive": "1"}, ("0", "1")),
        ((1, 0), {"positive": "0"}, ("1", "0")),
        ((True, False), {}, ("0", "1")),
        ((True, False), {"positive": "true"}, ("false", "true")),
        (("b", 0, 1), {"class_names": ("a", "b")}, ("not b", "b")),
        ((0.5, 1), {"soft_labels": True}, ("0", "1")),
    ],
)
def test_names_of_classes_are_the_words_of_the_data(values, options, names):
    assert class_names_of(load_examples(rows(*values), **options)) == names


def test_label_text_of_numbers_beyond_floats():
    assert label_text(10**30) == str(10**30)
    assert label_text("9" * 40) == "9" * 40
    assert label_text(float("inf")) == "inf"
    assert label_text(b"\xff") is None
    assert label_text(b" yes") == "yes"
