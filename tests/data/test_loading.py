"""Rows to examples: what each cell may hold, what is refused on which line, and confinement to a folder."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.images.opening import open_image

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def picture(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder of data: images a.png and b.png in images/, and secret.png beside the folder."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "images" / "a.png").write_bytes(picture())
    (data / "images" / "b.png").write_bytes(picture("blue"))
    (tmp_path / "secret.png").write_bytes(picture())
    return data


def jsonl(folder: Path, *rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**cells) -> dict:
    return {"image": "images/a.png", "text": "a claim", "label": 1, **cells}


def problem(source, **options) -> str:
    """Return the problem of the only bad row of `source`."""
    with pytest.raises(DataError) as caught:
        load_examples(source, **options)
    head, found, *end = str(caught.value).splitlines()
    assert re.match(r"1 of \d+ rows of .+ cannot be used:$", head)
    assert end[0] == "Correct these rows or take them out, then load again, or leave them out with max_errors=."
    assert end[1].startswith("Relative image paths start from ")
    return found.strip()


class TestSources:
    EXPECTED = (("a claim", 1, "x", {"kind": "k"}), ("another", 0, "y", {"kind": "k"}))

    def check(self, examples):
        assert tuple((one.text, one.label, one.id, one.fields) for one in examples) == self.EXPECTED
        colors = [open_image(one.image).getpixel((0, 0)) for one in examples]
        assert colors == [(255, 0, 0), (0, 0, 255)]

    def rows(self):
        return [row(id="x", kind="k"), row(image="images/b.png", text="another", label=0, id="y", kind="k")]

    def test_jsonl(self, folder):
        self.check(load_examples(jsonl(folder, *self.rows())))

    def test_csv(self, folder):
        lines = [",".join(self.rows()[0]), *(",".join(map(str, one.values())) for one in self.rows())]
        (folder / "rows.csv").write_text("\n".join(lines))
        self.check(load_examples(folder / "rows.csv"))

    @pytest.mark.parametrize("form", ["path", "bytes", "struct", "struct of path"])
    def test_parquet(self, folder, form):
        import pyarrow
        from pyarrow import parquet

        rows = self.rows()
        for one in rows:
            data = (folder / one["image"]).read_bytes()
            one["image"] = {
                "path": one["image"],
                "bytes": data,
                "struct": {"bytes": data, "path": "elsewhere.png"},
                "struct of path": {"bytes": None, "path": one["image"]},
            }[form]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
        self.check(load_examples(folder / "rows.parquet"))

    def test_hugging_face_dataset(self, folder):
        datasets = pytest.importorskip("datasets")
        rows = self.rows()
        for one in rows:
            one["image"] = str(folder / one["image"])
        dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        self.check(load_examples(dataset))

    def test_hugging_face_labels_by_name(self):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
        )
        dataset = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 2, -1]}, features=features)
        dataset = dataset.add_column("image", [None] * 3)
        assert [one.label for one in load_examples(dataset, positive="c")] == [0, 1, None]

    def test_dicts_and_examples(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        self.check(load_examples(self.rows()))
        self.check(load_examples(load_examples(self.rows())))
        self.check(load_examples(one for one in self.rows()))

    def test_folder_of_classes(self, folder):
        for label, name in (("0", "b.png"), ("1", "a.png")):
            (folder / label).mkdir()
            (folder / "images" / name).rename(folder / label / name)
        (folder / "images").rmdir()
        examples = load_examples(folder, text="is it red?", require_labels=True)
        assert [(one.text, one.label, one.fields) for one in examples] == [
            ("is it red?", 0, {}),
            ("is it red?", 1, {}),
        ]
        assert open_image(examples[1].image).getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(DataError, match="expected the text that goes with all of them; give it, such as text="):
            load_examples(folder)

    @pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets lie beside the checkout, where there are any")
    def test_real_data(self):
        sizes = {}
        for path in sorted(SHARED.glob("*/train.jsonl")):
            examples = load_examples(path, require_labels=True)
            assert {one.label for one in examples} == {0, 1}
            assert open_image(examples[0].image).mode == "RGB"
            sizes[path.parent.name] = len(examples)
        assert sizes == {
            "coffee": 2802,
            "easyvqa_tiny": 800,
            "grocery": 1620,
            "nlvr": 1000,
            "pneumonia": 4708,
        }


class TestCells:
    def test_columns_can_be_renamed(self, folder):
        path = jsonl(folder, {"photo": "images/a.png", "claim": "c", "verdict": 1, "key": "k", "text": "other"})
        (example,) = load_examples(
            path, image_column="photo", text_column="claim", label_column="verdict", id_column="key"
        )
        assert (example.text, example.label, example.id, example.fields) == ("c", 1, "k", {"text": "other"})

    @pytest.mark.parametrize(
        ("value", "count"), [(None, 0), ([], 0), (["images/a.png"], 1), (["images/a.png", "images/b.png"], 2)]
    )
    def test_several_pictures_or_none(self, folder, value, count):
        (example,) = load_examples(jsonl(folder, row(image=value)))
        assert len(example.images) == count
        assert (example.image is None) == (count == 0)
        assert all(Path(path).is_file() for path in example.images)

    def test_pictures_in_python(self, folder):
        sources = [folder / "images" / "a.png", picture(), Image.new("RGB", (2, 2))]
        examples = load_examples([row(image=source) for source in [*sources, sources]])
        assert [one.image for one in examples] == [
            str(sources[0]),
            *sources[1:],
            (str(sources[0]), *sources[1:]),
        ]

    @pytest.mark.parametrize(
        ("value", "label"),
        [
            *((value, 0) for value in (0, False, 0.0, "0", "0.0", np.int64(0), np.bool_(False), np.float32(0))),
            *((value, 1) for value in (1, True, 1.0, "1", "1.0", np.int64(1), np.bool_(True), np.float32(1))),
            *((value, None) for value in (None, float("nan"), np.float64("nan"))),
        ],
    )
    def test_labels(self, value, label):
        (example,) = load_examples([row(image=None, label=value)])
        assert example.label is label or (type(example.label) is int and example.label == label)

    @pytest.mark.parametrize("value", [2, -1, 0.5, "2", "", "yes", [1], {"a": 1}, np.array([1, 0])])
    def test_other_labels_are_refused(self, value):
        found = problem([row(image=None, label=value)])
        assert re.match(r"row 1: label is .+, expected 0 or 1", found)
        assert ("positive=" in found) == (isinstance(value, str) and value != "")

    def test_words_as_labels(self):
        rows = [row(image=None, label=label) for label in ("defective", "fine", None, "scratched", "1")]
        assert [one.label for one in load_examples(rows, positive="defective")] == [1, 0, None, 0, 0]

    def test_missing_label(self):
        rows = [{"image": None, "text": "words"}, row(image=None)]
        assert [one.label for one in load_examples(rows)] == [None, 1]
        assert problem(rows, require_labels=True) == "row 1: no column 'label'"
        assert problem([row(image=None, label=None)], require_labels=True) == "row 1: label is null, expected 0 or 1"

    @pytest.mark.parametrize("value", [None, "", " \n\t", 7, ["words"], "half \ud83d"])
    def test_text_must_be_words(self, value):
        assert re.match(r"row 1: text (is|holds) .+, expected ", problem([row(image=None, text=value)]))

    def test_text_may_hold_any_whole_character(self):
        text = "<|image_pad|> \U0001f600 \u2028 \N{CYRILLIC SMALL LETTER A}"
        assert load_examples([row(image=None, text=text)])[0].text == text

    def test_one_text_for_all_rows(self):
        rows = [{"image": None}, row(image=None)]
        assert [one.text for one in load_examples(rows, text="same")] == ["same", "same"]
        with pytest.raises(ConfigError, match="which is blank"):
            load_examples(rows, text=" ")

    def test_ids(self):
        rows = [row(image=None, id=value) for value in ("a", 7, np.int64(8), None, None)]
        assert [one.id for one in load_examples(rows)] == ["a", "7", "8", None, None]
        assert problem([row(image=None, id="7"), row(image=None), row(image=None, id=7)]) == (
            "row 3: id is '7', as on row 1"
        )
        for value in (True, 1.5, "", " ", ["a"]):
            assert re.match(r"row 1: id is .+, expected ", problem([row(image=None, id=value)]))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("images/c.png", "'images/c.png' does not exist"),
            ("images", "'images' does not exist"),
            ("", "is blank"),
            ("a\0b", "does not exist"),
            ("x" * 10_000, "does not exist"),
            ("https://host/a.png", "is a URL"),
            (["images/a.png", None], "is of type NoneType"),
            (["images/a.png", "images/c.png"], "'images/c.png' does not exist"),
            ({"bytes": None, "path": None}, "is of type NoneType"),
            ({"url": "x"}, "is of type dict"),
            (7, "is of type int"),
            ([["images/a.png"]], "is of type list"),
        ],
    )
    def test_other_pictures_are_refused(self, folder, value, message):
        found = problem(jsonl(folder, row(image=value)))
        assert found.startswith("line 1: image ")
        assert message in found
        assert len(found) < 300

    @pytest.mark.parametrize("value", [b"", np.zeros((2, 2, 3)), object()])
    def test_other_objects_are_refused(self, value):
        assert "expected a path, the bytes of an image file or a PIL image" in problem([row(image=value)])


class TestConfinement:
    @pytest.fixture
    def escapes(self, folder):
        (folder / "link.png").symlink_to(folder.parent / "secret.png")
        (folder / "up").symlink_to(folder.parent)
        (folder / "circle.png").symlink_to("circle.png")
        (folder / "inner.png").symlink_to("images/a.png")
        return folder

    @pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "link.png", "up/secret.png", "{abs}"])
    def test_what_leaves_the_folder_is_refused(self, escapes, name):
        name = name.replace("{abs}", str(escapes.parent / "secret.png"))
        path = jsonl(escapes, row(image=name))
        assert "is outside the folder of the data file; add allow_outside=True" in problem(path)
        (example,) = load_examples(path, allow_outside=True)
        assert open_image(example.image)

    @pytest.mark.parametrize("name", ["inner.png", "images/../images/a.png", "up/data/images/a.png", "{abs}"])
    def test_what_stays_inside_is_allowed(self, escapes, name):
        name = name.replace("{abs}", str(escapes / "images" / "a.png"))
        assert open_image(load_examples(jsonl(escapes, row(image=name)))[0].image)

    def test_existence_outside_is_not_told(self, escapes):
        found = {problem(jsonl(escapes, row(image=f"../{name}.png")))[-60:] for name in ("secret", "absent")}
        assert len(found) == 1

    def test_circle_of_links_is_broken(self, escapes):
        assert "is a broken link" in problem(jsonl(escapes, row(image="circle.png")))

    def test_folder_reached_by_a_link(self, folder):
        (folder.parent / "alias").symlink_to(folder)
        jsonl(folder, row())
        assert load_examples(folder.parent / "alias" / "rows.jsonl")

    def test_relative_source(self, folder, monkeypatch):
        jsonl(folder, row(), row(image="../secret.png"))
        monkeypatch.chdir(folder)
        assert problem("rows.jsonl").startswith("line 2: ")

    def test_rows_in_python_are_not_confined(self, folder):
        assert load_examples([row(image=str(folder.parent / "secret.png"))])


class TestReport:
    def test_all_problems_are_counted_and_ten_are_listed(self, folder):
        good, bad = row(), row(label=2)
        rows = [good, "", "{broken", bad, row(text=" ", image="no.png"), *[bad] * 10, good]
        with pytest.raises(DataError) as caught:
            load_examples(jsonl(folder, *rows))
        lines = str(caught.value).splitlines()
        assert lines[0] == f"13 of 15 rows of {folder / 'rows.jsonl'} cannot be used:"
        assert lines[1].startswith("  line 3: not JSON")
        assert lines[2] == "  line 4: label is 2, expected 0 or 1"
        assert lines[3] == "  line 5: image 'no.png' does not exist, expected a file; text is blank, expected words"
        assert [line.split(":")[0] for line in lines[4:11]] == [f"  line {number}" for number in range(6, 13)]
        assert lines[11] == "  and 3 more"
        assert lines[12] == "Correct these rows or take them out, then load again, or leave them out with max_errors=."
        assert lines[13] == f"Relative image paths start from {folder}."
        assert lines[14:] == ["Labels that were read: '2' (11 rows), '1' (3 rows)."]

    def test_csv_counts_physical_lines(self, folder):
        (folder / "rows.csv").write_text('image,text,label\nimages/a.png,"two\nlines",1\n\n,x,3\n')
        assert (
            problem(folder / "rows.csv")
            == "line 5: label is '3', expected 0 or 1, or positive= to say which word counts as 1"
        )

    @pytest.mark.parametrize(
        ("lacks", "option"),
        [("image", "image_column="), ("text", "text_column="), ("label", "label_column=")],
    )
    def test_column_that_no_row_has_is_named_once(self, lacks, option):
        rows = [{name: value for name, value in row(image=None).items() if name != lacks}] * 20
        with pytest.raises(DataError) as caught:
            load_examples(rows, require_labels=True)
        message = str(caught.value)
        assert "\n" not in message
        assert f"no column {lacks!r}; its columns are {', '.join(map(repr, rows[0]))}; " in message
        assert option in message

    def test_column_that_one_row_lacks(self):
        assert problem([row(image=None), {"text": "words"}]) == "row 2: no column 'image'"

    @pytest.mark.parametrize(
        ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", "image\n")]
    )
    def test_empty_file(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="holds no rows"):
            load_examples(tmp_path / name)

    def test_empty_list(self):
        with pytest.raises(DataError, match="the list holds no rows"):
            load_examples([])

    def test_objects_are_not_spelled_out(self):
        assert problem([row(image=None, label=object())]) == "row 1: label is of type object, expected 0 or 1"


class TestLimit:
    def test_limit_takes_the_first_rows_and_reads_no_further(self, folder):
        path = jsonl(folder, row(id="a"), "", row(id="b"), "{broken")
        assert [one.id for one in load_examples(path, limit=2)] == ["a", "b"]
        assert problem(path, limit=3).startswith("line 4: not JSON")

    def test_limit_of_endless_rows(self):
        assert len(load_examples(iter(lambda: row(image=None), None), limit=5)) == 5

    @pytest.mark.parametrize("limit", [0, -1])
    def test_limit_below_one_is_refused(self, limit):
        with pytest.raises(ConfigError, match="limit="):
            load_examples([row()], limit=limit)


def test_examples_can_be_used_as_given():
    (example,) = load_examples([Example(b"bytes", "words", 1, "x", {"k": 1})])
    assert example == Example(b"bytes", "words", 1, "x")
    assert example.fields == {"k": 1}


def test_import_is_cheap():
    code = "import sys, qwen_vl_classifier.data.loading; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "pyarrow", "datasets", "torch", "transformers", "pandas"} & set(loaded)


def test_soft_labels_are_numbers_from_0_to_1():
    rows = [{"image": None, "text": "x", "label": label} for label in (0, "0.25", 0.5, True, None)]
    assert [example.label for example in load_examples(rows, soft_labels=True)] == [0, 0.25, 0.5, 1, None]
    assert "expected 0 or 1" in problem(rows[:2])
    assert "expected a number from 0 to 1" in problem([row(image=None, label=1.5)], soft_labels=True)
    assert "expected a number from 0 to 1" in problem([row(image=None, label="likely")], soft_labels=True)
    assert "is null" in problem([row(image=None, label=None)], soft_labels=True, require_labels=True)
    with pytest.raises(ConfigError, match="soft labels are numbers"):
        load_examples(rows, soft_labels=True, positive="yes")
