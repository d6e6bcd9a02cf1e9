"""Tables in memory: DataFrames of pandas and polars, and tables of pyarrow, by their columns."""

from __future__ import annotations

import pytest
from PIL import Image

from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.scoring.sources import GivenRows

COLUMNS = {
    "image": [None, None, None],
    "text": ["one", "two", "three"],
    "label": [1, 0, None],
    "id": [7, 8, None],
    "group": ["a", None, "b"],
}
EXPECTED = [("one", 1, "7"), ("two", 0, "8"), ("three", None, None)]


class PolarsFrame:
    """What is used of a DataFrame of polars, which need not be installed."""

    def __init__(self, columns: dict[str, list]) -> None:
        self._data = columns
        self.columns = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self._data.values())))

    def slice(self, start: int, count: int) -> PolarsFrame:
        return type(self)({name: cells[start : start + count] for name, cells in self._data.items()})

    def iter_rows(self, *, named: bool):
        assert named
        return (dict(zip(self.columns, cells, strict=True)) for cells in zip(*self._data.values(), strict=True))


Polars = type("DataFrame", (PolarsFrame,), {"__module__": "polars.dataframe.frame"})


def frame(kind: str, columns: dict[str, list]):
    if kind == "pandas":
        return pytest.importorskip("pandas").DataFrame(columns)
    if kind == "pandas, nullable":
        return pytest.importorskip("pandas").DataFrame(columns).convert_dtypes()
    if kind == "polars":
        return Polars(columns)
    import pyarrow

    table = pyarrow.table(columns)
    return table.to_batches()[0] if kind == "arrow batch" else table


KINDS = ["pandas", "pandas, nullable", "polars", "arrow", "arrow batch"]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_rows(self, kind):
        examples = load_examples(frame(kind, COLUMNS))
        assert [(one.text, one.label, one.id) for one in examples] == EXPECTED
        assert [one.image for one in examples] == [None] * 3
        assert examples[0].fields == {"group": "a"}

    def test_words_and_columns_of_other_names(self, kind):
        columns = {"picture": [None] * 3, "claim": ["x", "y", "z"], "verdict": ["yes", " yes", "no"]}
        options = {"image_column": "picture", "text_column": "claim", "label_column": "verdict"}
        examples = load_examples(frame(kind, columns), positive="yes", **options)
        assert [(one.text, one.label, one.label_text) for one in examples] == [
            ("x", 1, "yes"),
            ("y", 1, "yes"),
            ("z", 0, "no"),
        ]

    def test_rows_that_cannot_be_used_are_named(self, kind):
        with pytest.raises(DataError, match=r"1 of 3 rows of the .+ cannot be used:\n  row 2: text is null"):
            load_examples(frame(kind, COLUMNS | {"text": ["one", None, "three"]}))
        with pytest.raises(DataError, match="has no column 'text'; its columns are"):
            load_examples(frame(kind, {"image": [None], "caption": ["x"]}))

    def test_any_rows_of_it(self, kind):
        numbers = [*range(5000)]
        rows = GivenRows(frame(kind, {"text": [str(one) for one in numbers]}), Columns("image", "text", "label", "id"))
        assert len(rows) == 5000
        assert [row.number for row in rows.rows(2000, 1500)] == [*range(2001, 3501)]
        assert [row.values["text"] for row in rows.rows(4998, 10)] == ["4998", "4999"]


def test_pictures_in_a_frame():
    pandas = pytest.importorskip("pandas")
    picture = Image.new("RGB", (4, 4))
    examples = load_examples(
        pandas.DataFrame({"image": [picture, b"bytes", None], "text": ["a", "b", "c"]}, index=[9, 9, 1])
    )
    assert [one.image for one in examples] == [picture, b"bytes", None]


def test_a_column_that_is_there_twice():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="names column 'text' twice"):
        load_examples(pandas.DataFrame([[1, 2]], columns=["text", "text"]))
    table = pandas.DataFrame([[None, "a claim", 1, 2]], columns=["image", "text", "more", "more"])
    assert load_examples(table)[0].text == "a claim"  # a column that is not used does no harm


@pytest.mark.parametrize("name", ["DataFrame", "LazyFrame"])
def test_a_table_of_another_library(name):
    other = type(name, (), {"__module__": "pyspark.sql", "__iter__": lambda self: iter(())})()
    with pytest.raises(DataError, match=rf"got a {name} of pyspark; expected a DataFrame of pandas or polars"):
        load_examples(other)
