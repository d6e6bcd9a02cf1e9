"""Rows given in Python: by position, and told apart by what they hold."""

from __future__ import annotations

import pytest
from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.scoring.given import GivenRows

COLUMNS = Columns("image", "text", "label", "id")


def digest(*rows, count: int = 10) -> str:
    return GivenRows(list(rows), COLUMNS).digest(count)


def test_rows_are_numbered_in_the_whole_source():
    given = GivenRows(iter([{"text": "a"}, Example(None, "b", id="x"), 7]), COLUMNS)
    assert (len(given), given.name) == (3, "the list_iterator")
    found = list(given.rows(1, 5))
    assert [row.number for row in found] == [2, 3]
    assert found[0].values["text"] == "b"
    assert found[1].problem == "a int, wanted a dict or an Example"


def test_the_digest_is_of_content():
    row = {"image": b"x", "text": "words", "id": "a"}
    same = digest(row)
    assert same == digest({**row, "label": 1}) == digest(Example(b"x", "words", 1, "a"))
    assert same == digest(row, {"text": "more"}, count=1)
    others = [
        digest({**row, "image": b"y"}),
        digest({**row, "text": "other"}),
        digest({**row, "id": "b"}),
        digest(row, row),
        digest({**row, "image": [b"x"]}),
        digest({**row, "image": {"bytes": b"x"}}),
    ]
    assert len({same, *others}) == 7


def test_the_digest_of_a_picture_is_of_its_pixels():
    def picture(shade: int) -> Image.Image:
        return Image.new("RGB", (4, 3), (shade, 0, 0))

    assert digest({"image": picture(1)}) == digest({"image": picture(1)})
    wide = Image.new("RGB", (500, 1))  # too wide to be opened: an error has a digest too
    assert len({digest({"image": one}) for one in (picture(1), picture(2), wide, None)}) == 4


@pytest.mark.parametrize("source", [b"bytes", 7, None, {"caption": "one row"}])
def test_what_is_no_list_of_rows_is_refused(source):
    with pytest.raises(DataError):
        GivenRows(source, COLUMNS)
