"""The data set: what `train` reads, with pictures that are found and no column lost."""

import datetime
import json
from decimal import Decimal

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example, load_examples
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.images.identity import picture_identity
from qwen_vl_classifier.labelling.answers.labelled_rows import LabelledFile, LabelledRow
from tests.images.picture_files import COLOUR, encoded


def labelled(example, position=0, **labels):
    return LabelledRow(position, example, labels or {"label": 1}, "random", ("ann", "bob"))


def written(path, *rows):
    """Write rows, and return the file with its content."""
    file = LabelledFile(path)
    file.write(rows)
    return file, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def photo(tmp_path):
    """A picture in a subfolder."""
    path = tmp_path / "photos" / "ä b.png"
    path.parent.mkdir()
    COLOUR.save(path)
    return path


def test_pictures_are_found_from_the_folder_of_the_file(tmp_path, photo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        Example("photos/ä b.png", "one", id="a"),
        Example((str(photo), "photos/../photos/ä b.png"), "two"),
        Example(None, "none"),
    ]
    (tmp_path / "out").mkdir()
    file, lines = written(tmp_path / "rows.jsonl", *(labelled(row, place) for place, row in enumerate(rows)))
    assert [line["image"] for line in lines] == ["photos/ä b.png", ["photos/ä b.png"] * 2, None]
    assert (lines[0]["id"], "id" in lines[1], file.outside) == ("a", False, False)
    loaded = load_examples(tmp_path / "rows.jsonl")
    assert [row.label for row in loaded] == [1, 1, 1]
    assert loaded[0].fields == {"sampled": "random", "annotator": "ann, bob"}


def test_a_picture_outside_is_named_absolutely(tmp_path, photo):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link.png").symlink_to(photo)
    rows = [labelled(Example(str(path), "x"), place) for place, path in enumerate((photo, tmp_path / "out/link.png"))]
    file, lines = written(tmp_path / "out" / "rows.jsonl", *rows)
    assert file.outside
    assert [line["image"] for line in lines] == [str(photo), str(tmp_path / "out/link.png")]
    with pytest.raises(DataError, match="outside the folder"):
        load_examples(file.path)
    assert len(load_examples(file.path, allow_outside=True)) == 2


def test_pictures_in_memory_become_files(tmp_path):
    jpeg = encoded(COLOUR, "JPEG")
    file, lines = written(tmp_path / "rows.jsonl", labelled(Example(jpeg, "x")), labelled(Example(COLOUR, "y"), 1))
    assert not file.outside
    loaded = load_examples(file.path)
    assert [picture_identity(row.images[0]) for row in loaded] == [picture_identity(jpeg), picture_identity(COLOUR)]
    assert [line["image"].partition("/")[0] for line in lines] == ["rows-pictures"] * 2
    assert lines[0]["image"].endswith(".jpg")
    assert (tmp_path / lines[0]["image"]).read_bytes() == jpeg


def test_no_column_is_lost(tmp_path):
    fields = {
        "group": "g1",
        "label": "old",
        "sampled": "by hand",
        "text": "another",
        "data_text": "taken",
        "when": datetime.datetime(2026, 1, 2, 3, 4),
        "price": Decimal("1.50"),
        "count": np.int64(3),
        "broken": float("nan"),
        "raw": b"\x00\xff",
        "nested": {"a": [Decimal(2), datetime.date(2026, 1, 2)]},
        "bad\ud800": "half\ud800",
    }
    _, (line,) = written(tmp_path / "rows.jsonl", labelled(Example(None, "x", fields=fields)))
    assert line == {
        "image": None,
        "text": "x",
        "group": "g1",
        "data_label": "old",
        "data_sampled": "by hand",
        "data_data_text": "another",
        "data_text": "taken",
        "when": "2026-01-02T03:04:00",
        "price": 1.5,
        "count": 3,
        "broken": None,
        "raw": "AP8=",
        "nested": {"a": [2, "2026-01-02"]},
        "bad\ud800": "half\ud800",
        "label": 1,
        "sampled": "random",
        "annotator": "ann, bob",
    }


def test_several_labels_have_a_column_each(tmp_path):
    row = labelled(Example(None, "x", fields={"dirty": "yes", "shelf": 7}), defect=1, dirty=None)
    _, (line,) = written(tmp_path / "rows.jsonl", row)
    assert (line["defect"], line["dirty"], line["data_dirty"], line["shelf"]) == (1, None, "yes", 7)
    example = row.to_example(None)
    assert example.label is None
    assert example.fields["defect"] == 1


def test_in_memory_it_has_the_names_of_its_classes():
    row = labelled(Example(None, "x", label=0, label_text="cat"))
    example = row.to_example(("cat", "dog"))
    assert (example.label, example.label_text) == (1, "dog")
    assert example.fields == {"data_label": "cat", "sampled": "random", "annotator": "ann, bob"}
    assert row.to_example(("0", "1")).label_text is None


def test_a_picture_whose_name_looks_like_a_url(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "data:1.png")
    file, (line,) = written(tmp_path / "rows.jsonl", labelled(Example(str(tmp_path / "data:1.png"), "x")))
    assert line["image"] == "./data:1.png"
    assert len(load_examples(file.path)) == 1
