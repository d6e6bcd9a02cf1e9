"""Tables as people have them: packed, of other programs, in other encodings, and files that are no tables at all."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import Columns, LoadOptions
from qwen_vl_classifier.data.text_files import MAX_ROW_BYTES, format_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.scoring.plan import make_plan
from qwen_vl_classifier.scoring.reading import ShardReader

COLUMNS = Columns("image", "text", "label", "id")
ROWS = [
    {"image": None, "text": text, "label": label} for text, label in (("red", "1"), ("blue", "0"), ("grün; ja", "1"))
]
CSV = "image,text,label\n,red,1\n,blue,0\n,grün; ja,1\n"


def written(path, content: str | bytes):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path) -> list:
    """Read a file in both ways: as a whole, and shard by shard, from the last one."""
    whole = [(row.number, row.values or row.problem) for row in read_table(path, LoadOptions()).rows]
    plan = make_plan(path, COLUMNS, shard_size=2)
    reader = ShardReader(plan.spec)
    shards = {index: reader.read(plan[index]) for index in reversed(range(len(plan)))}
    rows = [row for index in range(len(plan)) for row in shards[index]]
    assert [row.where for row in rows] == [f"{plan.spec.unit} {number}" for number, _ in whole]
    for row, (_, values) in zip(rows, whole, strict=True):
        assert (row.example.text if row.example else None) == (values["text"] if isinstance(values, dict) else None)
    return [values for _, values in whole]


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLES = {
    "a.tsv": CSV.replace(",", "\t"),
    "b.csv": CSV.replace(",", "\t"),
    "c.csv": 'image;text;label\r\n;red;1\r\n;blue;0\r\n;"grün; ja";1\r\n',
    "d.csv": "\ufeff" + CSV,
    "e.csv.gz": CSV,
    "f.tsv.gz": CSV.replace(",", "\t"),
    "g.jsonl.gz": JSONL,
    "h.ndjson.gz": JSONL,
    "i.json": json.dumps(ROWS, indent=2),
    "j.json.gz": json.dumps(ROWS),
    "k.json": JSONL,
    "l.csv": "image,text,label,,\n,red,1,,\n,,,,\n,blue,0,,\n,grün; ja,1,,\n,,,,\n",
    "M.CSV.GZ": CSV,
    "n.csv": 'sep=;\r\nimage;text;label\r\n;red;1\r\n;blue;0\r\n;"grün; ja";1\r\n',
    "o.csv": '\ufeff\r\n\r\nimage;text;label;"a, b"\r\n;red;1;\r\n;blue;0;\r\n;"grün; ja";1;\r\n',
    "p.csv": "image,text,label,more,more\n,red,1,,\n,blue,0,,\n,grün; ja,1,,\n",
}


UTF16 = {
    "a.csv": CSV.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "b.tsv": CSV.replace(",", "\t").encode("utf-16"),
    "c.csv": b"\xfe\xff" + CSV.encode("utf-16-be"),
    "d.jsonl": JSONL.encode("utf-16"),
    "e.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
}
"""As Excel's "Unicode text" is, and what PowerShell writes."""


@pytest.mark.parametrize("name", UTF16)
def test_utf_16_is_read_as_utf_8(tmp_path, name):
    path = written(tmp_path / name, UTF16[name])
    assert [{name: row[name] for name in ROWS[0]} for row in read(path)] == ROWS
    packed = tmp_path / "packed" / f"{name}.gz"
    packed.parent.mkdir()
    assert read(written(packed, UTF16[name])) == read(path)


def test_a_long_utf_16_file_is_read_from_any_row(tmp_path):
    rows = "".join(f"\tgrün {number} {'x' * 100}\t1\r\n" for number in range(3000))
    path = written(tmp_path / "a.csv", f"Image\tText\tLabel\r\n{rows}".encode("utf-16"))
    plan = make_plan(path, COLUMNS, shard_size=1000)
    last = ShardReader(plan.spec).read(plan[2])[-1]
    assert (last.where, last.example.text[:9]) == ("line 3001", "grün 2999")


@pytest.mark.parametrize(
    "header",
    [
        "image;text;label",
        "Image ; TEXT;label",
        'image;"text";label',
        "a, b, c and d;image;text;label",
        "image\ttext\tlabel; 0 or 1, or nothing",
        '"a;b;c",image,text',
        "image|text|label, 0 or 1",
    ],
)
def test_the_separator_is_the_one_that_gives_the_columns(tmp_path, header):
    plain = header.lower().replace('"', "").replace(" ", "")
    mark = next(one for one in ("\t", ";", ",", "|") if f"{one}text" in plain)
    cells = ["x"] * len(next(csv.reader([header], delimiter=mark)))
    path = written(tmp_path / "a.csv", f"{header}\n{mark.join(cells)}\n")
    with pytest.raises(DataError, match="'x' does not exist"):  # the picture: the row has been read
        load_examples(path, read_labels=False)
    semicolons = written(tmp_path / "b.tsv", "image;text;label\n;red;1\n")
    assert [example.text for example in load_examples(semicolons)] == ["red"]


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_table_gives_the_same_rows(tmp_path, name):
    path = written(tmp_path / name, b"")
    path.write_bytes(gzip.compress(TABLES[name].encode()) if name.lower().endswith(".gz") else TABLES[name].encode())
    assert [{name: row[name] for name in ROWS[0]} for row in read(path)] == ROWS
    assert [example.label for example in load_examples(path)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.csv", "csv"), ("a.TSV", "tsv"), ("a.csv.gz", "csv"), ("a.gz", None), ("a.parquet.gz", None), ("a.xlsx", None)],
)
def test_formats_by_name(name, kind):
    assert format_of(name) == kind


@pytest.mark.parametrize(("name", "advice"), [("a.xlsx", "save it as CSV UTF-8"), ("a.txt", "rename it to .csv")])
def test_files_of_spreadsheet_programs_are_refused_with_advice(tmp_path, name, advice):
    path = written(tmp_path / name, CSV)
    for reading in (load_examples, lambda path: make_plan(path, COLUMNS, shard_size=5)):
        with pytest.raises(DataError, match=advice):
            reading(path)


def test_rows_of_empty_cells_are_passed_over_and_line_numbers_stay(tmp_path):
    path = written(tmp_path / "a.csv", 'image,text,label\n,red,1\n,,\n , ,\n,blue,\n,"",""\n')
    assert [(row.number, row.values["text"]) for row in read_table(path, LoadOptions()).rows] == [
        (2, "red"),
        (5, "blue"),
    ]
    assert [example.text for example in load_examples(path, text="all the same", label_column="none")] == [
        "all the same",
        "all the same",
    ]
    read(path)


def test_a_long_cell_is_read(tmp_path):
    long = "<p>" * 50_000
    path = written(tmp_path / "a.csv", f"image,text,label,html\n,red,1,{long}\n,blue,0,\n")
    first, second = read(path)
    assert (first["html"], second["html"]) == (long, None)
    assert [len(example.text) for example in load_examples(path, text_column="html", limit=1)] == [150_000]


def test_a_quote_that_is_never_closed_is_still_an_error(tmp_path):
    for swallowed in ("x" * (MAX_ROW_BYTES + 1), ("x,y," * 1000 + "\n") * (MAX_ROW_BYTES // 4000 + 1)):
        path = written(tmp_path / "a.csv", 'a,b\n1,"' + swallowed)
        with pytest.raises(DataError, match=r"line 2: not CSV \(a quote is opened and not closed"):
            list(read_table(path, LoadOptions()).rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CSV.encode("utf-16") + b"\0", "is damaged UTF-16"),
        ("a.csv", b"label;image,text\n0;a.png,red\n", "separated by comma or semicolon"),
        ("a.csv", CSV.encode("utf-16-le"), "is UTF-16 without a mark"),
        ("a.jsonl", JSONL.encode("utf-16-be"), "is UTF-16 without a mark"),
        ("a.csv", CSV.replace("\n", "\r").encode(), "line 1: a line end of a carriage return alone"),
        ("a.csv", CSV.encode("cp1252"), "line 4: not UTF-8, but probably Windows-1252.*',grün; ja"),
        ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("latin-1"), "probably Windows-1252"),
        ("a.csv", JSONL.encode(), "holds JSON.*name it .json"),
        ("a.tsv", json.dumps(ROWS, indent=1).encode(), "holds JSON.*name it .json"),
        ("a.csv", b"<!DOCTYPE html><html>", "is an HTML page"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        ("a.csv", b"PK\x03\x04\x14\0\6\0", r"is a ZIP archive \(an Excel"),
        ("a.csv", gzip.compress(CSV.encode(), mtime=0), "is a gzip archive"),
        ("a.json", b'{"data": [1]}', "holds a JSON dict with 'data'; expected an array"),
        ("a.json", b'{"a": 1', "is not JSON"),
        ("a.json", b"7", "holds a JSON int"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for reading in (lambda: list(read_table(path, LoadOptions()).rows), lambda: make_plan(path, COLUMNS, shard_size=5)):
        with pytest.raises(DataError, match=message) as caught:
            reading()
        assert "\n" not in str(caught.value)


def test_packed_files_that_are_none_or_break_off(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(CSV.encode())
    with pytest.raises(DataError, match=r"is a text, not gzip"):
        load_examples(path)
    packed = gzip.compress(CSV.encode() * 10_000)
    few = gzip.compress(CSV.encode())
    for damaged in (
        packed[:-20],
        packed[:500] + b"\xff" * 40 + packed[540:],
        few[:10] + b"\xff" * 60,
        few[:-8] + bytes(8),
    ):
        for name in ("a.csv.gz", "a.jsonl.gz", "a.json.gz"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(DataError, match="is damaged"):
                load_examples(tmp_path / name)


def test_items_of_an_array_that_are_no_objects_are_problems_of_theirs(tmp_path):
    path = written(tmp_path / "a.json", '[{"image": null, "text": "x"}, 7]')
    assert read(path)[1] == "a JSON int, expected an object {...}"


def test_json_beside_pictures_is_no_data(tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "annotations.json").write_text("{}")
    plan = make_plan(tmp_path, COLUMNS, shard_size=5, text="words")
    assert plan.spec.format == "pictures"
