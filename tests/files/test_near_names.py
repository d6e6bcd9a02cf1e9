"""Names that are nearly right, and what a message says of them."""

from __future__ import annotations

import unicodedata

import pytest
from PIL import Image

from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import DataError, ImageError
from qwen_vl_classifier.files.near_names import NearNames, beside
from qwen_vl_classifier.images.opening import open_image

UMLAUT = "Bär.png"
COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", UMLAUT), unicodedata.normalize("NFD", UMLAUT)


@pytest.mark.parametrize(
    ("there", "asked", "described"),
    [
        ("img/a.png", "img/A.PNG", "there is 'img/a.png', in another case"),
        ("img/a.png", "IMG/a.png", "there is 'img/a.png', in another case"),
        ("img/a.png", "img\\a.png", "there is 'img/a.png', with / in place of \\"),
        ("a.png", "a.png ", "there is 'a.png', with other spaces around it"),
        ("a.png ", "a.png", "there is 'a.png ', with other spaces around it"),
        ("a.png", "data/a.png", "there is 'a.png', in another folder"),
        ("img/a.png", "a.png", "there is 'img/a.png', in another folder"),
        ("img/deep/a.png", "deep/a.png", "there is 'img/deep/a.png', in another folder"),
        ("a.jpeg", "a.jpg", "there is 'a.jpeg'"),
        (DECOMPOSED, COMPOSED, f"there is {DECOMPOSED!r}, the same in another Unicode form"),
        (COMPOSED, DECOMPOSED, f"there is {COMPOSED!r}, the same in another Unicode form"),
        ("a.png", "b.png", ""),
        ("a.png", "../A.png", ""),
        ("a.png", "", ""),
        ("a.png", "A\0.png", ""),
    ],
)
def test_a_near_name_is_described(tmp_path, there, asked, described):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).touch()
    assert NearNames(tmp_path).describe(asked) == described


def test_nothing_outside_is_looked_at(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.png").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    for name in ("link/A.png", "../secret/A.png", "A.png"):
        assert NearNames(tmp_path / "data").find(name) == ""


def test_messages_name_it(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "Red.png")
    (tmp_path / "rows.csv").write_text("image,text,label\nred.PNG,words,1\nblue.png,words,0\n")
    with pytest.raises(
        DataError, match=r"'red.PNG' does not exist, expected a file; there is 'Red.png', in another case\n"
    ):
        load_examples(tmp_path / "rows.csv")
    with pytest.raises(ImageError, match=r"No such file or directory\); expected an image file; there is 'Red.png'"):
        open_image(tmp_path / "red.png")
    assert main(["train", str(tmp_path / "Rows.CSV"), "--out", str(tmp_path / "out")]) == 2
    assert "there is 'rows.csv', in another case" in capsys.readouterr().err
    assert beside(tmp_path / "blue.png") == ""
