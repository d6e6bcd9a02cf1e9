"""Formats to rows: how each format is read and numbered, and what of it is refused as a whole."""

import itertools
import json
import os
import tracemalloc

import pandas
import pytest

from qwen_vl_classifier.config.spelling import naming_flags
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import LoadOptions
from qwen_vl_classifier.errors import DataError


def row_values(source):
    return ((row.number, row.values or row.problem) for row in read_table(source, LoadOptions()).rows)


def rows(source):
    return list(row_values(source))


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_jsonl_is_numbered_by_physical_line(tmp_path, suffix):
    path = written(tmp_path / f"a{suffix}", '\ufeff{"a": 1}\n\n  \r\n{"a": "\u2028 is no line break"}\r\n{"a": 3}')
    assert rows(path) == [(1, {"a": 1}), (4, {"a": "\u2028 is no line break"}), (5, {"a": 3})]
    assert read_table(path, LoadOptions()).unit == "line"
    assert read_table(str(path), LoadOptions()).folder == tmp_path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1', "not JSON (Expecting ',' delimiter at column 8)"),
        (b"[1]", "a JSON list, expected an object {...}"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "JSON beyond what can be read"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "JSON beyond what can be read"),
    ],
)
def test_bad_jsonl_line_does_not_stop_the_rest(tmp_path, line, problem):
    path = written(tmp_path / "a.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    assert rows(path) == [(1, {"a": 0}), (2, problem), (3, {"a": 2})]


def test_csv_is_numbered_by_the_first_line_of_a_row(tmp_path):
    path = written(tmp_path / "a.csv", '\ufeffa,"b c"\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n,x\r\n')
    assert rows(path) == [(2, {"a": "1", "b c": 'two\r\nlines, "quoted"'}), (5, {"a": None, "b c": "x"})]


def test_csv_row_of_other_length_is_a_problem_of_that_row(tmp_path):
    path = written(tmp_path / "a.csv", "a,b\n1\n1,2\n1,2,3\n")
    assert rows(path) == [
        (2, "1 cells under a header of 2"),
        (3, {"a": "1", "b": "2"}),
        (4, "3 cells under a header of 2"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,text\n1,2\n", "names column 'text' twice"),
        (b'a,b\n1,"2\n', r"line 2: not CSV \(unexpected end of data\)"),
        (b'a,b\n1,"2"x\n', "line 2: not CSV"),
        (b"a,b\n1,2\n1,\xff\n", "line 3: not UTF-8"),
    ],
)
def test_unreadable_csv_names_the_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        rows(written(tmp_path / "a.csv", content))


def test_parquet_is_numbered_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"a": list(range(3000)), "image": [{"bytes": b"x", "path": None}] * 3000})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    read = rows(tmp_path / "a.parquet")
    assert [number for number, _ in read] == list(range(1, 3001))
    assert read[2999][1] == {"a": 2999, "image": {"bytes": b"x", "path": None}}


def test_unreadable_parquet_is_a_data_error(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": ["x"] * 1000}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for content in (
        b"",
        b"PAR1",
        whole[:-30],
        whole[:40] + whole[60:],
    ):
        with pytest.raises(DataError, match=r"as Parquet \(\w+\); expected a whole file"):
            rows(written(tmp_path / "a.parquet", content))


def test_parquet_row_of_text_that_is_not_utf8_is_a_problem_of_that_row(tmp_path):
    import pyarrow
    from pyarrow import parquet

    broken = pyarrow.array([b"good", b"\xff"]).view("string")
    parquet.write_table(pyarrow.table({"text": broken, "note": broken}), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [
        (1, {"text": "good", "note": "good"}),
        (2, "holds text that is not UTF-8, or a date beyond Python's"),
    ]


def test_a_needed_column_is_named_once(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="names column 'text' twice"):
        rows(tmp_path / "a.parquet")
    parquet.write_table(table.rename_columns(["more", "more"]), tmp_path / "a.parquet")
    assert len(rows(tmp_path / "a.parquet")) == 1


def test_few_rows_of_large_pictures_are_read_at_a_time(tmp_path):
    """Whoever takes three rows pays for a few, not for a thousand with their pictures."""
    import pyarrow
    from pyarrow import parquet

    count, size = 300, 1 << 20
    table = pyarrow.table({"image": [bytes([row % 256]) * size for row in range(count)]})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, data_page_size=size, write_batch_size=4)
    del table  # a page is always read whole: only pages of few rows show how much is read
    first = list(itertools.islice(read_table(tmp_path / "a.parquet", LoadOptions()).rows, 3))
    assert [row.values["image"][0] for row in first] == [0, 1, 2]
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        reading = read_table(tmp_path / "a.parquet", LoadOptions()).rows
        assert len(list(itertools.islice(reading, 3))) == 3
        assert tracemalloc.get_traced_memory()[1] < 40 * size  # all would take 300
        assert pyarrow.total_allocated_bytes() - before < 40 * size
    finally:
        tracemalloc.stop()


def test_few_rows_of_a_dataset_of_large_pictures_are_read_at_a_time():
    datasets = pytest.importorskip("datasets")
    size = 1 << 20
    dataset = datasets.Dataset.from_dict({"image": [bytes([row]) * size for row in range(100)]})
    tracemalloc.start()
    try:
        assert [values["image"][0] for _, values in itertools.islice(row_values(dataset), 3)] == [0, 1, 2]
        assert tracemalloc.get_traced_memory()[1] < 40 * size
    finally:
        tracemalloc.stop()
    shuffled = dataset.shuffle(seed=0)
    assert [values["image"][0] for _, values in row_values(shuffled)] == [one[0] for one in shuffled["image"]]


def test_dataset_is_read_without_decoding(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "more": datasets.List(datasets.Image()),
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    broken = {"bytes": b"no picture", "path": None}
    data = {"image": [broken, None, broken], "more": [[broken], [], []], "label": [1, -1, 0]}
    dataset = datasets.Dataset.from_dict(data, features=features)
    assert rows(dataset) == [
        (1, {"image": broken, "more": [broken], "label": 1}),
        (2, {"image": None, "more": [], "label": None}),
        (3, {"image": broken, "more": [], "label": 0}),
    ]
    assert [getattr(values["label"], "name", None) for _, values in rows(dataset)] == ["good", None, "bad"]
    assert [values["label"] for _, values in rows(dataset.select([2, 0]))] == [0, 1]
    with pytest.raises(DataError, match="got a DatasetDict of 'train'"):
        rows(datasets.DatasetDict(train=dataset))


def test_a_dataset_keeps_its_names_where_it_is_streamed_or_written_as_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bad", "good"])})
    broken = {"bytes": b"no picture", "path": None}
    data = {"image": [broken, None, broken], "label": [1, -1, 0]}
    dataset = datasets.Dataset.from_dict(data, features=features)
    dataset.to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", dataset.to_iterable_dataset()):
        read = [values for _, values in rows(source)]
        assert [values["image"] for values in read] == [broken, None, broken]  # none is decoded
        assert [(values["label"], getattr(values["label"], "name", None)) for values in read] == [
            (1, "good"),
            (None, None),
            (0, "bad"),
        ]


def test_a_note_in_a_parquet_file_that_says_nothing(tmp_path):
    import pyarrow
    from pyarrow import parquet

    for note in (b"\xff{", b"7", b"{}", b'{"info": {"features": {"label": {"names": 5}}}}'):
        table = pyarrow.table({"label": [1]}).replace_schema_metadata({"huggingface": note})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert rows(tmp_path / "a.parquet") == [(1, {"label": 1})]


def test_iterables_of_dicts_and_examples():
    example = Example("a.png", "words", 1, "x", {"kind": "k"})
    values = {"kind": "k", "image": "a.png", "text": "words", "label": 1, "id": "x"}
    expected = [(1, values), (2, {"a": 1}), (3, "a str, expected a dict or an Example")]
    assert rows([example, {"a": 1}, "row"]) == expected
    assert rows(iter([example, {"a": 1}, "row"])) == expected
    assert rows(example) == [(1, values)]
    assert rows({"text": "words"}) == [(1, {"text": "words"})]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://host/a.jsonl", "is a URL"),
        ("missing.jsonl", "No such file"),
        ("a\0b.jsonl", "not valid"),
        ("x" * 100_000, "too long"),
        (__file__, "ends in '.py'; expected one of .jsonl, .ndjson, .csv, .parquet, .tsv, .json"),
        (b"bytes", "got a bytes"),
        (7, "got a int"),
        (None, "got a NoneType"),
        ({"train": [], "test": []}, "got a dict of 'train', 'test'; expected one row"),
        (["a.jpg", "b.jpg"], 'got a list of str; expected dicts or Examples; write each row as {"image": '),
        (("a.jpg", "a claim"), "got a tuple of str; expected dicts or Examples"),
        ([("a.jpg", "a claim")], "got a list of tuple; expected dicts or Examples"),
        (pandas.DataFrame({"image": ["a.jpg"]})["image"], "got a Series of pandas, .*; give frame\\[:1\\] for one row"),
    ],
)
def test_other_sources_are_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        rows(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_picture_in_place_of_a_data_file_is_named(tmp_path):
    (tmp_path / "photo.JPG").write_bytes(b"")
    with pytest.raises(DataError, match=r'for a picture alone give \{"image": "photo\.jpg", "text": '):
        rows(tmp_path / "photo.JPG")
    with naming_flags(), pytest.raises(DataError, match="convert or rename it"):
        rows(tmp_path / "photo.JPG")


def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="pipe"):
        rows(tmp_path / "a.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_unreadable_file_is_a_data_error(tmp_path):
    path = written(tmp_path / "a.jsonl", json.dumps({}))
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        rows(path)
