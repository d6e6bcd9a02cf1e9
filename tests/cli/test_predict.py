"""`predict` on pictures, folders and tables: the same answers as `Classifier.decide`, beside the user's own columns."""

from __future__ import annotations

import csv
import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from qwen_vl_classifier import Classifier, load_examples
from qwen_vl_classifier.cli.main import main

TEXT = "The picture is red."
TABLE = 'ID;Image ;TEXT;Datum\r\n007;red.png;Is it red?;31.12.2025\r\n007;blue.png;"Red; or not?";\r\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_classifier):
    """Two photos, a table about them, and a classifier that remembers one text and abstains in a wide band."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "photos").mkdir()
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        for place in (folder, folder / "photos"):
            Image.new("RGB", (60, 40), colour).save(place / f"{name}.png")
    (folder / "rows.csv").write_bytes(TABLE.encode("utf-8-sig"))
    classifier = Classifier(
        tiny_classifier.backbone,
        tiny_classifier.tap,
        tiny_classifier.head,
        tiny_classifier.spec,
        label_names=("blue", "red"),
        training={"text": TEXT},
    )
    classifier.save(folder / "clf")
    return folder


@pytest.fixture
def predict(folder, capsys, monkeypatch):
    """Run the verb in the folder; return status, output and errors."""
    monkeypatch.chdir(folder)

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["predict", "clf", *words, "--device", "cpu"])
        return (status, *capsys.readouterr())

    return run


def table(path, delimiter=","):
    return list(csv.DictReader(path.read_text("utf-8-sig").splitlines(), delimiter=delimiter))


def test_a_table_comes_back_with_what_decide_says(folder, predict, tmp_path):
    status, out, _ = predict("rows.csv", "--out", str(tmp_path / "scored.csv"))
    assert status == 0
    assert "2 rows, with the columns probability, label, decision, label_name added" in out
    content = (tmp_path / "scored.csv").read_bytes().decode("utf-8")
    for before, after in zip(TABLE.splitlines(), content.removeprefix("\ufeff").splitlines(), strict=True):
        assert after.startswith(f"{before};")
    classifier = Classifier.load(folder / "clf", device="cpu")
    wanted = classifier.decide(load_examples(folder / "rows.csv", id_column="none"))
    rows = table(tmp_path / "scored.csv", ";")
    assert [float(row["probability"]) for row in rows] == [one.probability for one in wanted]
    assert [row["decision"] for row in rows] == [one.decision for one in wanted]
    assert [row["label_name"] for row in rows] == [("blue", "red")[one.label] for one in wanted]
    assert f"2 rows: {[one.label for one in wanted].count(1)} yes (red)" in out


def test_each_format_has_the_same_answers(folder, predict, tmp_path):
    own = {"image": [str(folder / "red.png"), None], "text": ["a", "b"], "n": [1, 2]}
    parquet.write_table(pyarrow.table(own), tmp_path / "rows.parquet")
    found = []
    for name in ("a.parquet", "a.jsonl"):
        assert predict(str(tmp_path / "rows.parquet"), "--allow-outside", "--out", str(tmp_path / name))[0] == 0
    found = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == found
    assert [row["n"] for row in found] == own["n"]
    assert isinstance(found[0]["probability"], float)
    _, out, _ = predict(str(tmp_path / "rows.parquet"), "--allow-outside", "--json")
    assert [json.loads(line) for line in out.splitlines()] == found


def test_a_folder_is_listed_with_the_text_of_training(predict, tmp_path):
    status, out, told = predict("photos")
    assert status == 0
    assert f"text: {TEXT!r}, as in all rows of training; --text gives another" in told
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["picture", "blue.png", "red.png"]
    other = predict("photos", "Another text about it")
    assert "as in all rows of training" not in other[2]
    assert predict("photos", "--text", "Another text about it")[1] == other[1]
    assert predict("photos", "--limit", "1", "--out", str(tmp_path / "a.csv"))[0] == 0
    (row,) = table(tmp_path / "a.csv")
    assert list(row) == ["image", "probability", "label", "decision", "label_name"]


def test_several_pictures_are_examples_of_their_own_unless_told(predict):
    status, out, _ = predict("red.png", "blue.png", TEXT)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["picture", "red.png", "blue.png"]
    lines = [json.loads(line) for line in predict("red.png", "blue.png", "--json")[1].splitlines()]
    alone = json.loads(predict("blue.png", "--json", TEXT)[1])
    assert lines[1]["probability"] == pytest.approx(alone.pop("probability"), abs=1e-6)
    assert {name: lines[1][name] for name in alone} == alone
    together = predict("red.png", "blue.png", "--one-example", "--text", TEXT)[1]
    assert together.startswith("label ")
    assert predict("blue.png", "red.png", "--one-example", "--text", TEXT)[1] != together  # the order counts
    assert predict("red.png")[1] == predict("red.png", TEXT)[1]
    assert predict("-", "--text", "a.png")[0] == 0


def test_rows_that_cannot_be_used_get_an_error_where_that_is_allowed(folder, predict, tmp_path):
    data = folder / "bad.csv"
    data.write_text("image,text\nred.png,fine\ngone.png,no picture\nbroken.png,damaged\nred.png,\nred.png,a,b\n")
    (folder / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out.csv"
    status, _, told = predict("bad.csv", "--out", str(out))
    assert status == 2
    assert "3 of 5 rows of bad.csv cannot be used:" in told
    assert "leave them out with --skip-bad-rows" in told
    assert not out.exists()
    status, printed, told = predict("bad.csv", "--out", str(out), "--skip-bad-rows")
    assert status == 0
    assert "left out 4 of 5 rows:" in told
    assert printed.endswith(", 4 error\n")
    rows = table(out)
    assert [row["image"] for row in rows] == ["red.png", "gone.png", "broken.png", "red.png", "red.png"]
    assert [bool(row["probability"]) for row in rows] == [True, False, False, False, False]
    assert [row["error"][:28] for row in rows] == [
        "",
        "image 'gone.png' does not ex",
        str(rows[2]["error"])[:28],
        "text is null, expected text",
        "3 cells under a header of 2",
    ]
    assert "broken.png" in rows[2]["error"]
    assert predict("bad.csv", "--out", str(out), "--max-errors", "3", "--overwrite")[0] == 2


def test_names_that_are_taken_get_a_prefix(folder, predict, tmp_path):
    data = folder / "labelled.jsonl"
    data.write_text(json.dumps({"text": "a", "image": None, "Label": "red"}) + "\n")
    out = tmp_path / "out.jsonl"
    assert predict("labelled.jsonl", "--out", str(out))[0] == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert list(row)[3:] == [f"predicted_{name}" for name in ("probability", "label", "decision", "label_name")]
    again = tmp_path / "again.jsonl"
    status, _, told = predict(str(out), "--out", str(again))
    assert status == 2
    assert "already has a column 'predicted_probability'" in told
    assert "--prefix" in told
    assert predict(str(out), "--out", str(again), "--prefix", "second_")[0] == 0
    assert "second_label" in json.loads(again.read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rows.csv", "--out", "rows.csv"), "is the table itself"),
        (("rows.csv", "--out", "there.csv"), "exists; give another file, or --overwrite"),
        (("rows.csv", "--out", "a.doc"), "expected a name that ends in"),
        (("none.csv", "--out", "a.csv"), "cannot be opened"),
        (("rows.csv", "a text", "more"), "expected one table or folder"),
        (("photos", "--one-example"), "leave it out"),
        (("red.png", "gone.png"), "'gone.png' does not exist"),
        (("red.png", "blue", "cat"), "'blue' is not a file; expected pictures, and then one text; a text with spaces"),
        (("a text",), "only 'a text'"),
        (("gone.png", "a text"), "gone.png"),
    ],
)
def test_what_cannot_be_meant_is_an_error_before_a_model_is_loaded(folder, predict, monkeypatch, words, message):
    (folder / "there.csv").write_text("mine")
    monkeypatch.setattr(Classifier, "load", None)
    status, out, told = predict(*words)
    assert (status, out) == (2, "")
    assert message in told
    assert (folder / "there.csv").read_text() == "mine"


def test_without_a_text_of_training_one_must_be_given(folder, predict, tiny_classifier, capsys):
    tiny_classifier.save(folder / "other")
    for words in (["photos"], ["red.png"]):
        assert main(["predict", "other", *words, "--device", "cpu"]) == 2
        assert "was not trained with one text for all rows" in capsys.readouterr().err


def test_what_is_printed_is_bounded(folder, predict):
    data = folder / "many.csv"
    data.write_text("image,text\n" + "".join(f",{'x' * 99}\n" for _ in range(45)))
    _, out, _ = predict("many.csv")
    lines = out.splitlines()
    assert len(lines) == 43
    assert max(map(len, lines)) < 120
    assert lines[-2].startswith("... and 5 more; write all of them with --out")
    assert lines[-1].startswith("45 rows: ")
    assert len(predict("many.csv", "--json")[1].splitlines()) == 45
