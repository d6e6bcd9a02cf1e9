"""Rows that cannot be used are counted once, whatever is wrong with them and whenever it shows."""

from __future__ import annotations

import pytest
from PIL import Image

from qwen_vl_classifier.config.spelling import naming_flags
from qwen_vl_classifier.data.bad_rows import BadRows, Examples
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import as_examples, load_examples
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.errors import DataError

TABLE = """image,text,label
a.png,good,1
,no picture is fine,0
gone.png,missing picture,1
broken.png,damaged picture,1
a.png,no label,
a.png,odd label,maybe
a.png,,1
a.png,one,cell,too,many
"""


@pytest.fixture
def table(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "rows.csv").write_text(TABLE)
    return tmp_path / "rows.csv"


def test_every_kind_of_bad_row_is_left_out_and_counted(table):
    examples = load_examples(table, require_labels=True, max_errors="100%")
    assert [example.text for example in examples] == ["good", "no picture is fine", "damaged picture"]
    bad = BadRows("100%", given=examples, can_leave_out=True)
    read_sizes(examples, bad)
    bad.check(len(examples))
    assert [example.text for example in bad.without(examples)] == ["good", "no picture is fine"]
    record = bad.to_json(len(examples))
    assert (record["total"], record["of"], record["positions"]) == (6, 8, [2])
    assert [line.split(":")[0] for line in record["lines"]] == [f"line {number}" for number in (4, 6, 7, 8, 9, 5)]
    assert bad.note(len(examples)).startswith("6 of 8 rows cannot be used and were left out: line 4, line 6, ")


@pytest.mark.parametrize(("most", "fits"), [("5", False), ("6", True), ("74%", False), ("75%", True)])
def test_one_limit_counts_them_all(table, most, fits):
    examples = load_examples(table, require_labels=True, max_errors=most)
    bad = BadRows(most, given=examples, can_leave_out=True)
    read_sizes(examples, bad)
    if fits:
        bad.check(len(examples))
    else:
        with pytest.raises(DataError, match=f"6 of 8 rows cannot be used(.|\n)*max_errors='{most}' allows fewer"):
            bad.check(len(examples))


def test_too_many_are_an_error_already_when_rows_are_read(table):
    with pytest.raises(DataError, match=r"5 of 8 rows(.|\n)*max_errors='4' allows fewer"):
        load_examples(table, require_labels=True, max_errors="4")
    with pytest.raises(DataError, match="or leave them out with max_errors="):
        load_examples(table, require_labels=True)
    with naming_flags(), pytest.raises(DataError, match="or leave them out with --skip-bad-rows"):
        load_examples(table, require_labels=True)


def test_if_all_rows_are_bad_that_is_an_error_whatever_is_allowed(table):
    table.write_text("image,text\ngone.png,a\ngone.png,b\n")
    with pytest.raises(DataError, match="2 of 2 rows"):
        load_examples(table, max_errors="100%")
    table.write_text("image,text\nbroken.png,a\ngone.png,b\n")
    examples = load_examples(table, max_errors="100%")
    bad = BadRows("100%", given=examples)
    read_sizes(examples, bad)
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        bad.check(len(examples))


def test_rows_given_in_python_are_left_out_too():
    rows = [{"image": None, "text": "a", "label": 1}, {"image": None, "text": "b"}, {"image": "gone", "text": "c"}]
    examples = as_examples(rows, max_errors="100%")
    assert isinstance(examples, Examples)
    assert ([one.text for one in examples], [one.name for one in examples.unread]) == (["a"], ["row 2", "row 3"])
    given = [Example(None, "a", 1), Example(None, "b"), Example(None, "", 1)]
    examples = as_examples(given, max_errors=2)
    assert ([one.text for one in examples], len(examples.unread)) == (["a"], 2)
    again = as_examples(examples, max_errors=2)
    assert again.unread == examples.unread
    with pytest.raises(DataError, match="2 of 3"):
        as_examples(given, max_errors=1)
