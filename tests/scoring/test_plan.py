"""Shards joined are the whole data, whatever its format and wherever it is cut; planning is lazy and small."""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import psutil
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import Columns, LoadOptions
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.scoring import plan as planning
from qwen_vl_classifier.scoring.jobs import Task
from qwen_vl_classifier.scoring.plan import Plan, make_plan
from qwen_vl_classifier.scoring.reading import ShardReader
from qwen_vl_classifier.scoring.sources import SourceSpec

COLUMNS = Columns("image", "text", "label", "id")

PROPERTY = settings(max_examples=60)


def scattered(plan: Plan) -> list[tuple]:
    """Read all shards, the last first, as workers would: from JSON."""
    reader = ShardReader(SourceSpec.from_json(json.loads(json.dumps(asdict(plan.spec)))), plan.given)
    rows = []
    for shard in [Task.from_json(json.loads(json.dumps(Task(shard).to_json()))).shard for shard in plan][::-1]:
        found = reader.read(shard)
        assert len(found) == shard.rows
        assert [row.row for row in found] == list(range(shard.first_row, shard.first_row + shard.rows))
        rows[:0] = found
    assert len(rows) == plan.rows
    return [(row.id, row.example and row.example.text, row.error) for row in rows]


def whole(path: Path) -> list[tuple]:
    """Read a file in one go, as `load_examples` does."""
    rows = list(read_table(path, LoadOptions()).rows)
    return [
        (
            str(number if row.problem or row.values.get("id") is None else row.values["id"]),
            row.values.get("text"),
            row.problem and f"line {row.number}: {row.problem}",
        )
        for number, row in enumerate(rows)
    ]


words = st.text(st.characters(codec="utf-8"), max_size=8).map(lambda text: f"x{text}")
jsonl_lines = st.one_of(
    words.map(lambda text: json.dumps({"image": None, "text": text}, ensure_ascii=False).encode()),
    words.map(lambda text: json.dumps({"image": None, "text": text, "id": "i" + text}).encode()),
    st.sampled_from([b"", b"   ", b"{", b"[1]", b"\xff", b"\t", b"7"]),
)


@PROPERTY
@given(
    lines=st.lists(jsonl_lines, max_size=12),
    breaks=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.booleans(),
    last=st.booleans(),
    shard_size=st.integers(1, 14),
)
def test_jsonl_shards_joined_are_the_file(tmp_path, lines, breaks, mark, last, shard_size):
    lines = [json.dumps({"image": None, "text": "first"}).encode(), *lines]
    content = (b"\xef\xbb\xbf" if mark else b"") + breaks.join(lines) + (breaks if last else b"")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    plan = make_plan(path, COLUMNS, shard_size=shard_size)
    assert scattered(plan) == whole(path)
    assert plan.digest == hashlib.sha256(content).hexdigest()
    assert [shard.rows for shard in plan][:-1] == [shard_size] * (len(plan) - 1)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6).map(lambda text: f"x{text}")
csv_rows = st.one_of(
    st.tuples(cells, st.just(""), cells),
    st.tuples(cells, st.just(""), st.just("")),
    st.sampled_from([(), ("x",), ("x", "", "y", "z")]),  # a blank line; too few cells; too many
)


@PROPERTY
@given(
    rows=st.lists(csv_rows, max_size=10),
    breaks=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    last=st.booleans(),
    shard_size=st.integers(1, 12),
)
def test_csv_shards_joined_are_the_file(tmp_path, rows, breaks, mark, last, shard_size):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=breaks, quoting=csv.QUOTE_ALL)
    writer.writerows([["text", "image", "id"], ['two\r\nlines, "quoted"', "", "a"], *rows])
    content = (b"\xef\xbb\xbf" if mark else b"") + text.getvalue().removesuffix("" if last else breaks).encode()
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    plan = make_plan(path, COLUMNS, shard_size=shard_size)
    assert scattered(plan) == whole(path)
    assert plan.digest == hashlib.sha256(content).hexdigest()


@PROPERTY
@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    shard_size=st.integers(1, 12),
    limit=st.one_of(st.none(), st.integers(1, 30)),
)
def test_parquet_shards_joined_are_the_file(tmp_path, groups, shard_size, limit):
    path = tmp_path / "rows.parquet"
    schema = pyarrow.schema([("image", pyarrow.string()), ("text", pyarrow.string()), ("id", pyarrow.int64())])
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in [1, *groups]:
            columns = [[None] * rows, [f"text {count + row}" for row in range(rows)], range(count, count + rows)]
            writer.write_table(pyarrow.table(columns, schema), row_group_size=max(rows, 1))
            count += rows
    plan = make_plan(path, COLUMNS, shard_size=shard_size, limit=limit)
    expected = [(str(row), f"text {row}", "") for row in range(count)][:limit]
    assert scattered(plan) == expected


def jsonl(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(*numbers: int, image: str | None = None) -> list[dict]:
    return [{"image": image, "text": f"text {number}"} for number in numbers]


def test_files_of_a_glob_and_a_folder_are_joined_in_order(tmp_path):
    for name, numbers in (("b", (3, 4)), ("a", (0, 1, 2)), ("c", ()), ("d", (5,))):
        jsonl(tmp_path / "data" / f"{name}.jsonl", *texts(*numbers))
    by_folder = make_plan(tmp_path / "data", COLUMNS, shard_size=4)
    assert scattered(by_folder) == [(str(row), f"text {row}", "") for row in range(6)]
    assert [[span.rows for span in shard.spans] for shard in by_folder] == [[3, 1], [1, 1]]
    by_glob = make_plan(tmp_path / "data" / "*.jsonl", COLUMNS, shard_size=4)
    assert (by_glob.digest, scattered(by_glob)) == (by_folder.digest, scattered(by_folder))
    (tmp_path / "data").rename(tmp_path / "moved")
    assert make_plan(tmp_path / "moved", COLUMNS, shard_size=4).digest == by_folder.digest


def test_a_bad_row_of_several_files_names_its_file(tmp_path):
    jsonl(tmp_path / "a" / "rows.jsonl", *texts(0))
    jsonl(tmp_path / "b" / "rows.jsonl", *texts(1), {"image": None, "text": " "})
    plan = make_plan(tmp_path / "*" / "rows.jsonl", COLUMNS, shard_size=10)
    assert [error for *_, error in scattered(plan)][2] == "b/rows.jsonl, line 2: text is blank, expected words"


def test_the_digest_tells_files_apart(tmp_path):
    jsonl(tmp_path / "a.jsonl", *texts(0))
    jsonl(tmp_path / "b.jsonl", *texts(1))
    before = make_plan(tmp_path, COLUMNS, shard_size=10).digest
    jsonl(tmp_path / "b.jsonl", *texts(2))
    changed = make_plan(tmp_path, COLUMNS, shard_size=10).digest
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    renamed = make_plan(tmp_path, COLUMNS, shard_size=10).digest
    assert len({before, changed, renamed}) == 3


def test_a_limit_reads_no_further(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *texts(0, 1, 2))
    kept = hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("a") as file:
        file.write(json.dumps({"image": None, "text": "more"}) + "\nrubbish\n")
    plan = make_plan(path, COLUMNS, shard_size=2, limit=3)
    assert (plan.rows, len(plan), plan.digest) == (3, 2, kept)
    jsonl(tmp_path / "b.jsonl", *texts(0))
    assert make_plan(tmp_path, COLUMNS, shard_size=2, limit=3).rows == 3


pictures = st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=20)


@PROPERTY
@given(names=pictures, shard_size=st.integers(1, 6), kind=st.sampled_from(["jsonl", "csv", "parquet", "given"]))
def test_rows_of_one_picture_stay_together(tmp_path, names, shard_size, kind):
    rows = [{"image": name, "text": f"text {number}"} for number, name in enumerate(names)]
    source: Path | list = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(source, *rows)
    elif kind == "csv":
        source.write_text("image,text\n" + "".join(f"{row['image'] or ''},{row['text']}\n" for row in rows))
    elif kind == "parquet":
        schema = pyarrow.schema([("image", pyarrow.string()), ("text", pyarrow.string())])
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), source, row_group_size=3)
    else:
        source = rows
    plan = make_plan(source, COLUMNS, shard_size=shard_size, group_by_image=True)
    firsts = [shard.first_row for shard in plan]
    assert sum(shard.rows for shard in plan) == plan.rows == len(rows)
    for before, first in itertools.pairwise(firsts):
        assert names[first] is None or names[first] != names[first - 1]
        # Not a row more than the picture makes necessary.
        assert first == before + shard_size or len({*names[before + shard_size - 1 : first]}) == 1
    if kind != "given":  # whose pictures would have to be there
        assert len(scattered(plan)) == len(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "given"])
def test_files_of_the_same_content_are_one_picture(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.png", b"one"), ("copy.png", b"one"), ("other.png", b"two"), ("long.png", b"three")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.png").symlink_to("a.png")
    names = ["a.png", "copy.png", "./a.png", "link.png", "other.png", "gone.png", "./gone.png", "long.png"]
    rows = [{"image": name, "text": f"text {number}"} for number, name in enumerate(names)]
    source: Path | list = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(source, *rows)
    elif kind == "csv":
        source.write_text("image,text\n" + "".join(f"{row['image']},{row['text']}\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        source = rows
    plan = make_plan(source, COLUMNS, shard_size=1, group_by_image=True)
    assert [shard.rows for shard in plan] == [4, 1, 1, 1, 1]
    (tmp_path / "copy.png").write_bytes(b"new")
    changed = make_plan(source, COLUMNS, shard_size=1, group_by_image=True)
    assert [shard.rows for shard in changed] == [1, 1, 2, 1, 1, 1, 1]
    assert changed.digest != plan.digest  # else a run could go on with shards that begin elsewhere


def test_pictures_are_compared_by_content_and_in_lists():
    cells = [b"x", {"bytes": b"x", "path": "a"}, ["a", b"x"], ("a", b"x"), [], None, Path("a"), "a", {"path": "a"}]
    rows = [{"image": cell, "text": "words"} for cell in cells]
    plan = make_plan(rows, COLUMNS, shard_size=1, group_by_image=True)
    assert [shard.rows for shard in plan] == [2, 2, 1, 1, 3]


def test_rows_given_in_python_and_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": None, "text": f"text {row}", "id": f"row {row}"} for row in range(7)]
    expected = [(f"row {row}", f"text {row}", "") for row in range(7)]
    digests = set()
    for source in (rows, iter(rows), datasets.Dataset.from_list(rows)):
        plan = make_plan(source, COLUMNS, shard_size=3)
        assert scattered(plan) == expected
        assert (plan.spec.unit, plan.given is not None) == ("row", True)
        digests.add(plan.digest)
    assert len(digests) == 1
    assert make_plan(rows, COLUMNS, shard_size=3, limit=2).rows == 2
    assert make_plan([*rows[:-1], {**rows[-1], "text": "other"}], COLUMNS, shard_size=3).digest not in digests


def test_a_data_set_of_a_store(tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/planned/b.jsonl", json.dumps(texts(1)[0]).encode())
    files.pipe("/planned/a.jsonl", b"\xef\xbb\xbf" + json.dumps(texts(0)[0]).encode() + b"\r\n\r\n")
    for source in ("memory://planned", "memory://planned/*.jsonl"):
        plan = make_plan(source, COLUMNS, shard_size=1)
        assert scattered(plan) == [("0", "text 0", ""), ("1", "text 1", "")]
        assert [span.source for shard in plan for span in shard.spans] == [
            "memory://planned/a.jsonl",
            "memory://planned/b.jsonl",
        ]
    local = tmp_path / "planned"
    local.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (local / name).write_bytes(files.cat(f"/planned/{name}"))
    assert make_plan(f"file://{local}", COLUMNS, shard_size=1).digest == plan.digest
    parquet.write_table(pyarrow.Table.from_pylist(texts(*range(5))), local / "c.parquet")
    files.pipe("/parquet/c.parquet", (local / "c.parquet").read_bytes())
    stored = make_plan("memory://parquet/c.parquet", COLUMNS, shard_size=2)
    assert stored.digest == make_plan(local / "c.parquet", COLUMNS, shard_size=2).digest
    assert [text for _, text, _ in scattered(stored)] == [f"text {row}" for row in range(5)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": 0}, ConfigError, "limit=0"),
        ({"text": " "}, ConfigError, "text=' ', which is blank"),
        ({"columns": Columns("image", "claim", "label", "id")}, DataError, "has no column 'claim'"),
        ({"source": []}, DataError, "holds no rows"),
        ({"source": b"bytes"}, DataError, "got a bytes"),
        ({"source": "gone.jsonl"}, DataError, "No such file"),
        ({"source": "memory://gone/*.jsonl"}, DataError, "matches no file"),
        ({"source": "https://host/a.jsonl"}, ConfigError, "not a supported store"),
        ({"url_hosts": ["no host!"]}, ConfigError, "is not a host"),
    ],
)
def test_a_mistake_is_told_at_once(tmp_path, arguments, error, message):
    arguments = {"source": jsonl(tmp_path / "a.jsonl", *texts(0)), "columns": COLUMNS, "shard_size": 2, **arguments}
    with pytest.raises(error, match=message):
        make_plan(**arguments)


def test_an_empty_file_and_a_bare_header_hold_no_rows(tmp_path):
    for name, content in (("a.jsonl", "\n \n"), ("a.csv", "image,text\n"), ("b.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="holds no rows"):
            make_plan(tmp_path / name, COLUMNS, shard_size=2)


def test_a_column_may_be_missing_in_some_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *texts(0), {"image": None})
    assert [error for *_, error in scattered(make_plan(path, COLUMNS, shard_size=5))] == [
        "",
        "line 2: no column 'text'",
    ]


def test_a_column_that_is_not_asked_for_spoils_no_row(tmp_path):
    data = {"image": [None, None], "text": ["a", "b"], "when": pyarrow.array([1, 2**60], pyarrow.timestamp("us"))}
    parquet.write_table(
        pyarrow.table({**data, "broken": pyarrow.array([b"\xff"] * 2).view("string")}), tmp_path / "a.parquet"
    )
    assert [error for *_, error in scattered(make_plan(tmp_path / "a.parquet", COLUMNS, shard_size=5))] == ["", ""]


def test_parquet_is_planned_without_reading_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"image": ["x" * 100] * 5000, "text": ["words"] * 5000}), path)
    reads = []
    monkeypatch.setattr(planning.ParquetRows, "rows", lambda *arguments: reads.append(arguments))
    plan = make_plan(path, COLUMNS, shard_size=100)
    assert (len(plan), reads) == (50, [])


def test_a_shard_that_is_not_there_is_an_index_error(tmp_path):
    plan = make_plan(jsonl(tmp_path / "a.jsonl", *texts(0, 1)), COLUMNS, shard_size=1)
    assert [shard.index for shard in plan] == [0, 1]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            plan[index]


def plan_rows(path: Path, rows: int) -> int:
    """Write a manifest, plan it, and return the bytes of memory that planning took."""
    with path.open("w") as file:
        for row in range(rows):
            file.write(f'{{"id": "row-{row}", "image": null, "text": "Is this a red square, number {row}?"}}\n')
    gc.collect()
    before = psutil.Process().memory_info().rss
    plan = make_plan(path, COLUMNS, shard_size=1000)
    growth = psutil.Process().memory_info().rss - before
    assert (plan.rows, len(plan)) == (rows, -(-rows // 1000))
    assert ShardReader(plan.spec).read(plan[len(plan) - 1])[-1].id == f"row-{rows - 1}"
    return growth


def test_many_rows_are_planned(tmp_path):
    plan_rows(tmp_path / "rows.jsonl", 50_000)


@pytest.mark.soak
def test_a_million_rows_are_planned_in_little_memory(tmp_path):
    assert plan_rows(tmp_path / "rows.jsonl", 1_000_000) < 200e6
