"""Scores that repeat columns of the data: the same in each format, after a kill, and whatever is wrong with a row."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image
from pyarrow import parquet

from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.scoring.counting import decision_counts
from qwen_vl_classifier.scoring.formats import all_columns
from qwen_vl_classifier.scoring.run import score

TABLE = 'Image;TEXT;Label;price\na.png;one;yes;007\ngone.png;two;no;\n;"three; or more";;=1+1\n'
KEPT = [
    ("a.png", "one", "yes", "007"),
    ("gone.png", "two", "no", None),
    (None, "three; or more", None, "=1+1"),
]
COLUMNS = "image,text,label,price"


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text(TABLE)
    return tmp_path / "rows.csv"


def run(classifier, data, out, columns=COLUMNS, form="parquet", **more):
    config = ScoreConfig(columns=columns, format=form, shard_size=2)
    return score(classifier, data, out, config=config, progress=False, **more)


def rows_of(out, form):
    rows = []
    for path in sorted((out / "shards").iterdir()):
        if form == "parquet":
            rows += parquet.read_table(path).to_pylist()
        elif form == "jsonl":
            rows += map(json.loads, path.read_text().splitlines())
        else:
            rows += [
                {name: cell or None for name, cell in row.items()}
                for row in csv.DictReader(path.read_text("utf-8").splitlines(True))
            ]
    return rows


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_columns_go_along_as_text_also_of_rows_with_errors(tmp_path, data, tiny_classifier, form):
    run(tiny_classifier, data, tmp_path / "out", form=form)
    rows = rows_of(tmp_path / "out", form)
    assert list(rows[0])[:7] == ["id", "row", "image", "text", "data_label", "price", "probability"]
    found = [(row["image"], row["text"], row["data_label"], row["price"]) for row in rows]
    assert found == [tuple("'=1+1" if form == "csv" and cell == "=1+1" else cell for cell in row) for row in KEPT]
    assert [row["error_code"] for row in rows] == [None, "image_missing", None]
    run(tiny_classifier, data, tmp_path / "plain", columns="", form=form)
    plain = rows_of(tmp_path / "plain", form)
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain


def test_a_run_goes_on_to_the_same_bytes_and_refuses_other_columns(tmp_path, data, tiny_classifier):
    out = tmp_path / "out"
    run(tiny_classifier, data, out)
    shard = out / "shards" / "000001.parquet"
    before = shard.read_bytes()
    shard.unlink()
    assert run(tiny_classifier, data, out)["shards_written"] == 1
    assert shard.read_bytes() == before
    with pytest.raises(ConfigError, match=r"columns was .*, is now \['image'\]"):
        run(tiny_classifier, data, out, columns="image")
    with pytest.raises(ConfigError, match=r"columns was .*, is now absent"):
        run(tiny_classifier, data, out, columns="")


def test_workers_get_them_too(tmp_path, data, tiny_classifier, scores_here):
    tiny_classifier.save(tmp_path / "clf")
    run(tmp_path / "clf", data, tmp_path / "out", device="cpu")
    assert [row["text"] for row in rows_of(tmp_path / "out", "parquet")] == [row[1] for row in KEPT]


def test_one_text_for_all_rows_and_pictures_of_a_folder(tmp_path, data, tiny_classifier):
    run(tiny_classifier, data, tmp_path / "out", columns="text", text="the same")
    assert [row["text"] for row in rows_of(tmp_path / "out", "parquet")] == ["the same"] * 3
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30)).save(folder / "b.png")
    run(tiny_classifier, folder, tmp_path / "scored", columns="image,text", text="the same")
    (row,) = rows_of(tmp_path / "scored", "parquet")
    assert (row["image"], row["text"]) == ("b.png", "the same")


def test_values_of_python_become_text(tmp_path, tiny_classifier):
    rows = [{"image": None, "text": "a", "n": 7, "tags": ["x", 1], "blob": b"x"}, {"image": None, "text": "b"}]
    run(tiny_classifier, rows, tmp_path / "out", columns="n,tags,blob")
    found = rows_of(tmp_path / "out", "parquet")
    assert [(row["n"], row["tags"], row["blob"]) for row in found] == [("7", '["x", "1"]', None), (None, None, None)]
    with pytest.raises(ConfigError, match="data was"):  # a value that is repeated is part of the data
        run(tiny_classifier, [{**rows[0], "n": 8}, rows[1]], tmp_path / "out", columns="n,tags,blob")


def test_a_column_that_is_not_there_is_an_error_before_a_row_is_scored(tmp_path, data, tiny_classifier):
    with pytest.raises(DataError, match=r"has no column 'prize', which columns= names; .*did you mean 'price'"):
        run(tiny_classifier, data, tmp_path / "out", columns="prize")
    assert not (tmp_path / "out").exists()


def test_names_that_are_taken_are_told_apart():
    assert all_columns(["a"], kept=("label", "x"))[:4] == ["id", "row", "data_label", "x"]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_decisions_are_counted(tmp_path, data, tiny_classifier, form):
    out = tmp_path / "out"
    run([tiny_classifier, tiny_classifier], data, out, columns="", form=form)
    counts = decision_counts(out)
    yes = sum(row["decision_classifier1"] == "yes" for row in rows_of(out, form))
    assert counts == [f"classifier{number}: {yes} yes, {2 - yes} no" for number in (1, 2)]
