"""What a path names: one file, several of one format, or pictures; and rows given in Python."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.scoring.plan import make_plan
from qwen_vl_classifier.scoring.sources import GivenRows, PictureNames, find_files, list_pictures

COLUMNS = Columns("image", "text", "label", "id")


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def found(location: Path | str) -> tuple[str, list[str]]:
    files = find_files(str(location))
    return files.format, [files.name(path) for path in files.paths]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jsonl", "jsonl"), ("a.NDJSON", "jsonl"), ("a.csv", "csv"), ("a.parquet", "parquet")]
)
def test_one_file(tmp_path, name, kind):
    assert found(made(tmp_path, name) / name) == (kind, [name])


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(made(tmp_path, "data/a.csv", "data/b.csv"))
    assert find_files("data/a.csv").paths == (str(tmp_path / "data" / "a.csv"),)
    assert find_files("data/*.csv").paths == (str(tmp_path / "data" / "a.csv"), str(tmp_path / "data" / "b.csv"))
    assert find_files("data").root == str(tmp_path / "data")


def test_a_folder_of_files_leaves_marks_and_subfolders_alone(tmp_path):
    made(tmp_path, "b.jsonl", "a.ndjson", "_SUCCESS", ".a.crc", "_part.csv", "images/x.png", "old/c.jsonl")
    assert found(tmp_path) == ("jsonl", ["a.ndjson", "b.jsonl"])


@pytest.mark.parametrize("other", ["b.csv", "README.md", "b.jsonl.bz2", "x.png"])
def test_files_of_several_formats_are_refused(tmp_path, other):
    made(tmp_path, "a.jsonl", other)
    for location in (tmp_path, tmp_path / "*"):
        with pytest.raises(DataError, match=r"beside .* expected data files of one format; choose them with a glob"):
            found(location)
    assert found(tmp_path / "*.jsonl") == ("jsonl", ["a.jsonl"])


def test_a_glob_may_reach_into_subfolders(tmp_path):
    made(tmp_path, "b/2.csv", "a/1.csv", "a/deep/3.csv", "a/.h.csv", "c/x.png")
    assert found(tmp_path / "**" / "*.csv") == ("csv", ["a/1.csv", "a/deep/3.csv", "b/2.csv"])
    assert found(tmp_path / "[ab]" / "?.csv") == ("csv", ["a/1.csv", "b/2.csv"])


def test_a_name_that_looks_like_a_glob_is_a_name_where_it_is_there(tmp_path):
    made(tmp_path, "a[1].csv", "a1.csv")
    assert found(tmp_path / "a[1].csv") == ("csv", ["a[1].csv"])


def test_a_folder_without_data_files_is_one_of_pictures(tmp_path):
    made(tmp_path, "b.png", "0/a.jpg", "0/notes.txt")
    files = find_files(str(tmp_path))
    assert (files.format, files.paths) == ("pictures", (str(tmp_path),))
    assert list_pictures(files, follow_links=False).some(0, 9) == ("0/a.jpg", "0/notes.txt", "b.png")


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["a.jsonl.bz2"], ["sub/a.jsonl"]])
def test_a_folder_of_neither_is_refused(tmp_path, names):
    made(tmp_path, *names)
    with pytest.raises(DataError, match="holds neither pictures nor data files"):
        list_pictures(find_files(str(tmp_path)), follow_links=False)


def test_files_of_a_store():
    place = f"memory://{uuid.uuid4().hex}"
    files = fsspec.filesystem("memory")
    for name in ("b.csv", "a.csv", "_SUCCESS"):
        files.pipe(f"{place}/in/{name}", b"x")
    assert found(f"{place}/in") == ("csv", ["a.csv", "b.csv"])
    assert found(f"{place}/in/") == ("csv", ["a.csv", "b.csv"])
    assert found(f"{place}/*/b.csv") == ("csv", ["in/b.csv"])
    assert found(f"{place}/in/b.csv") == ("csv", ["b.csv"])
    with pytest.raises(DataError, match="cannot be opened"):
        found(f"{place}/gone.csv")


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("", DataError, "the path of the data is empty"),
        ("missing.jsonl", DataError, "No such file"),
        ("a\0b.jsonl", DataError, "the path is not valid"),
        ("x" * 100_000, DataError, "too long"),
        ("gone-*.jsonl", DataError, "matches no file"),
        (__file__, DataError, r"ends in '\.py'; expected \.jsonl, \.ndjson, \.csv, \.parquet, \.tsv, \.json files"),
        ("https://host/a.jsonl", ConfigError, "is not a supported store"),
        ("simplecache::s3://a/b.csv", ConfigError, "is not a supported store"),
    ],
)
def test_what_is_not_there_or_not_known_is_refused(location, error, message):
    with pytest.raises(error, match=message) as caught:
        find_files(location)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="pipe"):
        find_files(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("gone")], ids=["pipe", "broken link"])
def test_what_cannot_be_opened_is_not_passed_over(tmp_path, make):
    made(tmp_path, "a.jsonl")
    make(tmp_path / "b.jsonl")
    for location in (tmp_path, tmp_path / "*.jsonl"):
        assert found(location) == ("jsonl", ["a.jsonl", "b.jsonl"])
        with pytest.raises(DataError, match=r"b.jsonl cannot be read \((it is a pipe|No such file)"):
            make_plan(location, COLUMNS, shard_size=1)


def test_names_of_pictures_take_little_more_than_their_letters():
    names = PictureNames()
    expected = [f"folder/{number}-\u00e9.png" for number in range(1000)] + ["a\nb.png", os.fsdecode(b"\xff")]
    for name in expected:
        names.append(name, 1)
    assert (len(names), names.some(0, 2000), names.some(999, 2)) == (1002, tuple(expected), tuple(expected[999:1001]))
    assert len(names._letters) + names._ends.itemsize * len(names._ends) < 30 * len(names)


def digest(*rows, count: int = 10) -> str:
    return GivenRows(list(rows), COLUMNS).digest(count)


def test_rows_are_numbered_in_the_whole_source():
    given = GivenRows(iter([{"text": "a"}, Example(None, "b", id="x"), 7]), COLUMNS)
    assert (len(given), given.name) == (3, "the list_iterator")
    found = list(given.rows(1, 5))
    assert [row.number for row in found] == [2, 3]
    assert found[0].values["text"] == "b"
    assert found[1].problem == "a int, expected a dict or an Example"


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
