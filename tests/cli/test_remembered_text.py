"""One text of training stands in where the data has none, in every verb that has a classifier."""

from __future__ import annotations

import argparse

import pytest
from PIL import Image

from qwen_vl_classifier import Classifier, load_examples
from qwen_vl_classifier.cli.options import read_examples
from qwen_vl_classifier.cli.shared.remembered_text import text_for
from qwen_vl_classifier.errors import DataError

TEXT = "The picture is red."
COLUMNS = {"image_column": "image", "text_column": "text", "allow_outside": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_classifier):
    """Photos of two classes, tables about them, and classifiers that remember a text, another one, or none."""
    folder = tmp_path_factory.mktemp("remembered")
    for name in ("photos/0/a.png", "photos/1/b.png", "a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(folder / name)
    (folder / "without.csv").write_text("Image;n\na.png;1\n")
    (folder / "with.csv").write_text("Image;TEXT\na.png;own\n")
    for name, training in (("red", {"text": TEXT}), ("blue", {"text": "other"}), ("none", {}), ("odd", {"text": 7})):
        own = tiny_classifier
        made = Classifier(own.backbone, own.tap, own.head, own.spec, training=training)
        made.save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("data", "classifiers", "text"),
    [
        ("photos", ["red"], TEXT),
        ("without.csv", ["red"], TEXT),
        ("with.csv", ["red"], None),
        ("photos", ["none"], None),
        ("photos", ["odd"], None),
        ("photos", ["red", "red"], TEXT),
        ("photos", ["red", "blue"], None),
        ("photos", ["red", "none"], None),
        ("*.csv", ["red"], None),
        ("gone.csv", ["red"], None),
        ("", ["red"], None),
    ],
)
def test_it_stands_in_where_there_is_one_and_the_data_has_none(folder, capsys, data, classifiers, text):
    assert text_for(folder / data, [folder / name for name in classifiers], **COLUMNS) == text
    told = capsys.readouterr().err
    assert told == (f"text: {text!r}, as in all rows of training; --text gives another\n" if text else "")


def test_verbs_read_their_data_with_it(folder):
    flags = argparse.Namespace(
        **COLUMNS, label_column="label", id_column="id", positive=None, text=None, limit=None, max_text_chars=99
    )
    options = {"require_labels": True, "trained": [folder / "red"]}
    assert [(one.text, one.label) for one in read_examples(folder / "photos", flags, **options)] == [
        (TEXT, 0),
        (TEXT, 1),
    ]
    flags.text = "given"
    assert [one.text for one in read_examples(folder / "photos", flags, **options)] == ["given"] * 2


def test_a_folder_without_a_text_is_told_which_option_gives_it(folder):
    with pytest.raises(DataError, match=r"is a folder of pictures, which has no texts; .* such as text='The photo"):
        load_examples(folder / "photos")
