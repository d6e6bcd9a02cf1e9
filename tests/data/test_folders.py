"""Folders of pictures: classes by any name, metadata beside pictures, leftovers passed over, links that stay inside."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.scoring.plan import make_plan
from qwen_vl_classifier.scoring.reading import ShardReader

COLUMNS = Columns("image", "text", "label", "id")


def picture(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, form)
    return file.getvalue()


def made(folder: Path, *names: str) -> Path:
    """Write a picture under each name; return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())
    return folder


def loaded(folder: Path, **options) -> list[tuple[str, object]]:
    examples = load_examples(folder, text="is it so?", **options)
    return [(str(Path(one.image).relative_to(folder)), one.label) for one in examples]


def scored(folder: Path, **options) -> list[str]:
    plan = make_plan(folder, COLUMNS, shard_size=100, text="is it so?", **options)
    rows = [row for shard in plan for row in ShardReader(plan.spec).read(shard)]
    return [row.error or str(Path(row.example.image).relative_to(folder)) for row in rows]


def refusal(folder: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(folder, text="is it so?", **options)
    return str(caught.value)


def test_classes_by_number(tmp_path):
    folder = made(tmp_path, "1/b.PNG", "0/z.jpg", "0/a.webp", "0/deep/er/c.png", ".git/x.png", "readme.md")
    expected = [("0/a.webp", 0), ("0/deep/er/c.png", 0), ("0/z.jpg", 0), ("1/b.PNG", 1)]
    assert loaded(folder) == expected
    assert loaded(folder, positive="0") == [(name, 1 - label) for name, label in expected]
    assert loaded(folder, class_names=("normal", "odd"), require_labels=True) == expected


def test_classes_by_name(tmp_path):
    folder = made(tmp_path, "dog/1.png", "cat/2.png", "cat/old/1.png", "bird/1.png")
    expected = [("bird/1.png", 0), ("cat/2.png", 0), ("cat/old/1.png", 0), ("dog/1.png", 1)]
    assert loaded(folder, positive="dog", require_labels=True) == expected
    assert loaded(folder, class_names=("not dog", "dog")) == expected
    assert refusal(folder) == (
        f"{folder} has the class folders 'cat' (2 files), 'bird' (1 file), 'dog' (1 file); expected 0 and 1, or "
        "positive= with the name of the one that counts as 1, every other then counting as 0"
    )
    assert "no row of" in refusal(folder, positive="Dog")
    assert "did you mean 'dog'?" in refusal(folder, positive="Dog")
    assert "label is 'bird', expected 'cat' or 'dog'" in refusal(folder, class_names=("cat", "dog"))


def test_the_command_line_names_its_flag(tmp_path, capsys):
    folder = made(tmp_path / "pets", "dog/1.png", "cat/2.png")
    assert main(["train", str(folder), "--text", "a dog?", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "'cat' (1 file), 'dog' (1 file)" in error
    assert "--positive with the name" in error


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/cat/1.png", "val/cat/1.png"), "holds the parts 'train', 'val' of a data set"),
        (("Training/1.png", "validation/1.png", "test/1.png"), "of a data set; expected one of them; name it, such as"),
        (("pets/cat/1.png", "pets/dog/1.png"), "holds one folder, 'pets'"),
        (("1/a.png",), "holds one folder, '1'"),
        (("0/a.png", "1/a.png", "2/a.png"), "has the class folders '0' (1 file), '1' (1 file), '2' (1 file)"),
        (("a.png", "b.png"), "has no subfolders; expected one for each class"),
        (("images/a.png", "more/a.png", "rows.csv"), "holds the data file 'rows.csv'"),
        ((), "has no subfolders"),
    ],
)
def test_what_is_there_is_named_with_what_to_give(tmp_path, names, message):
    found = refusal(made(tmp_path, *names), require_labels=True)
    assert message in found
    assert "\n" not in found


def test_pictures_without_classes_have_no_labels(tmp_path):
    folder = made(tmp_path, "b.png", "a.png")
    assert loaded(folder) == [("a.png", None), ("b.png", None)]
    assert scored(folder) == ["a.png", "b.png"]


def test_labels_that_are_not_read_need_no_words(tmp_path):
    folder = made(tmp_path, "train/cat/a.png", "val/b.png", "c.png")
    assert loaded(folder, read_labels=False) == [("c.png", None), ("train/cat/a.png", None), ("val/b.png", None)]


def test_what_systems_and_archives_leave_is_passed_over(tmp_path):
    folder = made(tmp_path, "cat/a.png", "dog/b.png")
    left = (
        "cat/Thumbs.db",
        "cat/.DS_Store",
        "dog/desktop.ini",
        "Desktop.ini",
        "__MACOSX/cat/._a.png",
        "dog/@eaDir/x.jpg",
    )
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")
    assert loaded(folder, positive="dog") == [("cat/a.png", 0), ("dog/b.png", 1)]
    assert scored(folder) == ["cat/a.png", "dog/b.png"]


def test_content_decides(tmp_path):
    folder = made(tmp_path, "0/jpeg.txt", "0/none", "1/b.png")
    (folder / "0" / "jpeg.txt").write_bytes(picture("JPEG"))
    assert loaded(folder) == [("0/jpeg.txt", 0), ("0/none", 0), ("1/b.png", 1)]
    (folder / "0" / "notes.txt").write_text("no picture")
    found = refusal(folder)
    assert found.startswith("1 of 4 rows of")
    assert "picture 3: '0/notes.txt' in a folder of pictures: " in found
    assert [name.split(":")[0] for name in scored(folder)] == ["0/jpeg.txt", "0/none", "picture 3", "1/b.png"]


class TestMetadata:
    def written(self, folder: Path, name: str, rows: list[dict]) -> None:
        path = folder / name
        if name.endswith("jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name.endswith("csv"):
            path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    @pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
    @pytest.mark.parametrize("column", ["file_name", "image_file_name"])
    def test_of_every_format(self, tmp_path, name, column):
        folder = made(tmp_path, "a.png", "sub/b.png", "unnamed.png")
        rows = [{column: "sub/b.png", "text": "one", "label": 1}, {column: "a.png", "text": "two", "label": 0}]
        self.written(folder, name, rows)
        examples = load_examples(folder)
        assert [(Path(one.image).name, one.text, one.label) for one in examples] == [
            ("b.png", "one", 1),
            ("a.png", "two", 0),
        ]
        assert examples[0].fields == {}
        plan = make_plan(folder, COLUMNS, shard_size=10, group_by_image=True)
        assert [row.example.text for row in ShardReader(plan.spec).read(plan[0])] == ["one", "two"]

    def test_of_several_pictures(self, tmp_path):
        folder = made(tmp_path, "a.png", "b.png")
        self.written(folder, "metadata.jsonl", [{"file_names": ["a.png", "b.png"], "text": "one", "label": "dog"}])
        (example,) = load_examples(folder, positive="dog")
        assert [Path(path).name for path in example.images] == ["a.png", "b.png"]

    def test_an_image_column_goes_before(self, tmp_path):
        folder = made(tmp_path, "a.png", "b.png")
        self.written(folder, "metadata.jsonl", [{"file_name": "a.png", "image": "b.png", "text": "x", "label": 1}])
        (example,) = load_examples(folder)
        assert Path(example.image).name == "b.png"
        assert example.fields == {"file_name": "a.png"}

    def test_pictures_may_not_lie_outside(self, tmp_path):
        folder = made(tmp_path / "data", "a.png", "../out.png")
        self.written(folder, "metadata.csv", [{"file_name": "../out.png", "text": "x", "label": 1}])
        assert "line 2: file_name '../out.png' is outside the folder" in refusal(folder)

    def test_two_files_are_one_too_many(self, tmp_path):
        folder = made(tmp_path, "metadata.csv", "metadata.jsonl")
        assert "holds metadata.csv and metadata.jsonl; expected one file of metadata" in refusal(folder)


class TestLinks:
    @pytest.fixture
    def disk(self, tmp_path):
        return made(tmp_path / "disk" / "pets", "cat/a.png", "dog/b.png")

    def test_the_folder_that_is_named_may_be_a_link(self, disk, tmp_path):
        (tmp_path / "pets").symlink_to(disk)
        assert loaded(tmp_path / "pets", positive="dog") == [("cat/a.png", 0), ("dog/b.png", 1)]
        assert scored(tmp_path / "pets") == ["cat/a.png", "dog/b.png"]

    def test_a_linked_folder_that_leads_outside_is_named(self, disk, tmp_path):
        folder = made(tmp_path / "mine", "dog/c.png")
        (folder / "cat").symlink_to(disk / "cat")
        assert f"{folder / 'cat'} is a link to a folder that leads out of" in refusal(folder, positive="dog")
        assert "add allow_outside=True to follow it" in refusal(folder, positive="dog")
        with pytest.raises(DataError, match="add allow_outside=True to follow it"):
            scored(folder)
        expected = [("cat/a.png", 0), ("dog/c.png", 1)]
        assert loaded(folder, positive="dog", allow_outside=True) == expected
        assert scored(folder, allow_outside=True) == [name for name, _ in expected]

    def test_a_linked_file_that_leads_outside_is_named(self, disk, tmp_path):
        folder = made(tmp_path / "mine", "dog/c.png", "cat/d.png")
        (folder / "cat" / "e.png").symlink_to(disk / "cat" / "a.png")
        assert "image 'cat/e.png' (through the link 'cat/e.png') is outside the folder" in refusal(
            folder, positive="dog"
        )
        assert len(loaded(folder, positive="dog", allow_outside=True)) == 3

    def test_a_data_file_whose_pictures_lie_behind_a_link(self, disk, tmp_path):
        (tmp_path / "images").symlink_to(disk)
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"image": "images/cat/a.png", "text": "x", "label": 1}))
        assert load_examples(path)  # the link leads to a folder beside the data file
        path = tmp_path / "disk" / "rows.jsonl"
        (tmp_path / "disk" / "more").symlink_to(tmp_path)
        path.write_text(json.dumps({"image": "more/images/cat/a.png", "text": "x", "label": 1}))
        assert load_examples(path)  # out and in again
        made(tmp_path, "secret.png")
        path.write_text(json.dumps({"image": "more/secret.png", "text": "x", "label": 1}))
        with pytest.raises(DataError, match=r"image 'more/secret.png' \(through the link 'more'\) is outside"):
            load_examples(path)

    def test_links_inside_are_followed_and_loops_end(self, tmp_path):
        folder = made(tmp_path, "0/a.png", "1/b.png")
        (folder / "1" / "more").symlink_to("../0")
        (folder / "0" / "loop").symlink_to("..")
        (folder / "0" / "self").symlink_to(".")
        expected = [("0/a.png", 0), ("1/b.png", 1), ("1/more/a.png", 1)]
        assert loaded(folder) == expected
        assert scored(folder) == [name for name, _ in expected]


def test_a_link_to_what_is_not_there_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "dog" / "b.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"'dog/b.png' is a broken link"):
        load_examples(tmp_path, text="a claim", positive="dog")
    (tmp_path / "bird").symlink_to(tmp_path / "not mounted")
    with pytest.raises(DataError, match=r"bird is a broken link"):
        load_examples(tmp_path, text="a claim", positive="dog")


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(DataError, match="the path of the data is empty"):
        load_examples("")
