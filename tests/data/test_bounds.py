"""Rows that would take all memory: each is one bad row, named, and the rows beside it are read."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.parquet import ParquetRows, pages_of
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import MAX_COLUMNS, Columns, LoadOptions
from qwen_vl_classifier.data.text_files import MAX_ROW_BYTES
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.scoring.plan import make_plan
from qwen_vl_classifier.scoring.reading import ShardReader
from tests.images.picture_files import encoded

LONG = "x" * (MAX_ROW_BYTES + 1)
SEEN = rf"a row of 16,\d\d\d,\d\d\d bytes, expected at most {MAX_ROW_BYTES:,}"


def line(text: str) -> str:
    return json.dumps({"image": None, "text": text}) + "\n"


TABLES = {
    "a.jsonl": (line("one") + line(LONG) + line("two"), "line 2"),
    "b.jsonl.gz": (line("one") + line(LONG) + line("two"), "line 2"),
    "c.jsonl": (line("one") + "[" * len(LONG) + "\n" + line("two"), "line 2"),
    "d.csv": (f"image,text\n,one\n,{LONG}\n,two\n", "line 3"),
    "e.csv": (f'image,text\n,one\n,"{LONG}"\n,two\n', "line 3"),
    "f.csv": ('image,text\n,one\n,"' + ('x,"",' * 1000 + "\n") * (MAX_ROW_BYTES // 5000 + 1) + '"\n,two\n', "line 3"),
    "g.tsv": (f"image\ttext\n\tone\n\t{LONG}\n\ttwo\n", "line 3"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_row_of_too_many_bytes_is_one_bad_row(tmp_path, name):
    content, where = TABLES[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode(), 1) if name.endswith(".gz") else content.encode())
    plan = make_plan(path, Columns(), shard_size=2)
    rows = [row for shard in plan for row in ShardReader(plan.spec).read(shard)]
    assert [row.example.text if row.example else row.code for row in rows] == ["one", "invalid_row", "two"]
    assert rows[1].error.startswith(f"{where}: a row of 16,7")
    with pytest.raises(DataError, match=rf"1 of 3 rows .*\n  {where}: {SEEN}"):
        load_examples(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_text_of_too_many_characters_is_one_bad_row(tmp_path, suffix):
    rows = [{"image": None, "text": text} for text in ("one", "é" * 11, "two")]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        path.write_text("text,image\n" + "".join(f"{row['text']},\n" for row in rows))
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(line(row["text"]) for row in rows))
    with pytest.raises(DataError, match=r"text has 11 characters, expected at most 10; .*, or raise max_text_chars="):
        load_examples(path, max_text_chars=10)
    assert len(load_examples(path, max_text_chars=11)) == 3
    plan = make_plan(path, Columns(), shard_size=2, max_text_chars=10)
    found = [row.code for shard in plan for row in ShardReader(plan.spec).read(shard)]
    assert found == ["", "invalid_row", ""]


def test_rows_in_python_are_held_to_it_too():
    with pytest.raises(DataError, match=f"row 1: text has {MAX_TEXT_CHARS + 1:,} characters"):
        load_examples([{"image": None, "text": "x" * (MAX_TEXT_CHARS + 1)}])
    with pytest.raises(ConfigError, match="max_text_chars=0; expected at least 1"):
        load_examples([{"image": None, "text": "x"}], max_text_chars=0)


def test_long_cells_that_are_not_used_change_nothing(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image,text,page\n" + f",one,{'x' * 10_000_000}\n,two,\n")
    assert [example.text for example in load_examples(path)] == ["one", "two"]


def test_a_table_of_too_many_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"c{number}" for number in range(MAX_COLUMNS + 1)) + "\n")
    with pytest.raises(DataError, match=f"{MAX_COLUMNS + 1:,} columns; expected at most {MAX_COLUMNS:,}"):
        load_examples(path)


def test_an_array_of_many_small_values_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[" + "{}," * 5_000_001 + "{}]")
    with pytest.raises(DataError, match="more than 10,000,000 values; expected a smaller array; write it as JSONL"):
        load_examples(path)


def written(path: Path, table: pyarrow.Table, **options) -> Path:
    parquet.write_table(table, path, **options)
    return path


def test_a_value_that_many_rows_share_is_in_memory_once(tmp_path):
    picture = bytes(300_000)
    table = pyarrow.table({"image": [{"bytes": picture, "path": "a"}, None] * 150, "text": ["x"] * 300})
    rows = ParquetRows(io.BytesIO(written(tmp_path / "a.parquet", table).read_bytes()), "a").rows(0, 300)
    assert rows[::2] == [{"image": {"bytes": picture, "path": "a"}, "text": "x"}] * 150
    assert rows[1::2] == [{"image": None, "text": "x"}] * 150
    assert len({id(row["image"]["bytes"]) for row in rows[::2]}) < 150 / 10


def test_nested_values_are_those_of_pyarrow(tmp_path):
    lists = [["a", None, "b"], [], None, ["a"]]
    table = pyarrow.table(
        {
            "text": ["a", None, "a", "b"],
            "list": lists,
            "large": pyarrow.array(lists, pyarrow.large_list(pyarrow.large_string())),
            "fixed": pyarrow.array([["a", "b"], None, ["c", None], ["a", "a"]], pyarrow.list_(pyarrow.string(), 2)),
            "map": pyarrow.array([[("a", "b"), ("c", None)], None, [], [("a", "b")]], pyarrow.map_("string", "string")),
            "struct": [{"a": "x", "b": [{"c": b"y"}]}, None, {"a": None, "b": None}, {"a": "x", "b": []}],
            "category": pyarrow.array(["a", None, "a", "b"]).dictionary_encode(),
        }
    )
    content = io.BytesIO(written(tmp_path / "a.parquet", table).read_bytes())
    rows = ParquetRows(content, "a", needed=["text"])
    assert rows.rows(0, 4) == table.to_pylist()
    assert rows.rows(1, 2) == table.to_pylist()[1:3]
    assert [row.values for row in read_table(table, LoadOptions()).rows] == table.to_pylist()


BOMBS = {
    "a page": (pyarrow.table({"text": ["one", "x" * (80 << 20), "two"]}), {"use_dictionary": False}),
    "a dictionary": (pyarrow.table({"text": ["one", "x" * (80 << 20), "two"]}), {}),
    "nulls in a list": (
        pyarrow.table({"text": pyarrow.array([["x"], [None] * 17_000_000, ["y"]], pyarrow.list_(pyarrow.string()))}),
        {},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_that_unpack_to_many_are_not_unpacked(tmp_path, monkeypatch, name):
    table, options = BOMBS[name]
    table = pyarrow.concat_tables([table.slice(0, 1), table])
    table = table.append_column("image", pyarrow.nulls(len(table), pyarrow.string()))
    path = tmp_path / "rows.parquet"
    with parquet.ParquetWriter(path, table.schema, compression="zstd", **options) as writer:
        writer.write_table(table.slice(0, 1))
        writer.write_table(table.slice(1))
    assert path.stat().st_size < 100_000
    plan = make_plan(path, Columns(), shard_size=10, text="x" if name.startswith("nulls") else None)
    first, *others = ParquetRows(io.BytesIO(path.read_bytes()), "rows").rows(0, 4)
    assert list(first) == ["text", "image"]
    assert all(isinstance(one, str) and "expected" in one for one in others)
    assert len(others) == 3
    if not name.startswith("nulls"):  # the column of a text is needed, that of lists is not
        rows = ShardReader(plan.spec).read(plan[0])
        assert [row.code for row in rows] == ["", "invalid_row", "invalid_row", "invalid_row"]
        assert "row 2: " in rows[1].error
        assert "unpack to 8" in rows[1].error


def test_few_rows_of_large_pages_are_read_at_a_time(tmp_path):
    """Whatever the footer says: it is a program's, and others may have changed it."""
    table = pyarrow.table({"image": [bytes([row]) * 8_000_000 for row in range(8)], "text": ["x"] * 8})
    options = {"compression": "zstd", "use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}
    rows = ParquetRows(io.BytesIO(written(tmp_path / "a.parquet", table, **options).read_bytes()), "a")
    rows.batch_rows = 256  # as a footer that says too little makes it
    assert [row["image"][0] for row in rows.rows(0, 8)] == list(range(8))
    assert rows._batch is not None
    assert len(rows._batch) < 2


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_say_what_they_hold(tmp_path, version):
    table = pyarrow.table({"text": [f"text {row}" for row in range(5000)]})
    path = written(tmp_path / "a.parquet", table, data_page_version=version, data_page_size=4000, compression="gzip")
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("rb") as file:
        start = chunk.dictionary_page_offset
        pages = list(pages_of(file, start, start + chunk.total_compressed_size))
    assert [page.is_dictionary for page in pages] == [True] + [False] * (len(pages) - 1)
    assert sum(page.values for page in pages if not page.is_dictionary) == 5000
    assert sum(page.unpacked for page in pages) < chunk.total_uncompressed_size


@pytest.mark.parametrize(
    "header",
    [b"", b"\x15", b"\x15\x00", b"\xff" * 40, b"\x1c" * 200, b"\x19\xfc\xff\xff\xff\xff\x7f", b"\x15\0\x15\3\x15\3\0"],
)
def test_damaged_pages_are_an_error(header):
    with pytest.raises(ValueError, match="page"):
        list(pages_of(io.BytesIO(header + bytes(1)), 0, len(header) + 1))


def test_pictures_of_an_honest_size_stay_usable(tmp_path, monkeypatch):
    from PIL import Image

    picture = encoded(Image.effect_noise((2600, 2600), 90).convert("RGB"), "BMP")
    assert len(picture) > 20_000_000
    path = written(tmp_path / "a.parquet", pyarrow.table({"image": [picture] * 3, "text": ["x"] * 3}))
    plan = make_plan(path, Columns(), shard_size=10)
    monkeypatch.setattr("qwen_vl_classifier.scoring.reading._PART_BYTES", 30_000_000)
    parts = list(ShardReader(plan.spec).parts(plan[0]))
    assert [[row.row for row in part] for part in parts] == [[0, 1], [2]]
    assert all(row.example.image == picture for part in parts for row in part)


LITTLE_MEMORY = """
import resource, sys
import pyarrow.parquet, pyarrow.compute
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import DataError
with open("/proc/self/statm") as file:
    most = int(file.read().split()[0]) * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    load_examples(sys.argv[1])
except DataError as error:
    print(str(error).splitlines()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_hostile_tables_take_less_than_a_gigabyte(tmp_path):
    """A text of 20 MB that 300 rows share: 6 GB of copies, in a file of a few kB."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), ["x" * (20 << 20)])
    table = pyarrow.table({"image": pyarrow.nulls(300, pyarrow.string()), "text": text})
    path = written(tmp_path / "rows.parquet", table, compression="zstd")
    assert path.stat().st_size < 10_000
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve a gigabyte that they do not use
    command = [sys.executable, "-c", LITTLE_MEMORY, path]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.stdout == (
        "  row 1: text has 20,971,520 characters, expected at most 1,000,000; shorten it, or raise max_text_chars=\n"
    ), run.stderr
