"""The verb `explain`: its lines, its JSON, its heat map, and its one-line errors."""

import argparse
import copy
import json
import subprocess
import sys

import pytest
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.cli import explain as verb
from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.errors import ArtifactError, ConfigError, ImageError
from qwen_vl_classifier.evaluation.explanation import explain

TEXT = "Is the круг red? 图片 \x1b[31m\u202e " + "w" * 60


@pytest.fixture(scope="module")
def classifier_folder(tiny_classifier, tmp_path_factory):
    return tiny_classifier.save(tmp_path_factory.mktemp("explain") / "classifier")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((140, 84)).save(path)
    return path


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers(parser_class=VerbParser))
    flags = parser.parse_args(["explain", "--device", "cpu", *map(str, arguments)])
    return flags.run(flags)


def test_probability_and_words_fit_80_columns(classifier_folder, picture, tiny_classifier, capsys):
    assert run(classifier_folder, picture, TEXT) == 0
    output = capsys.readouterr().out
    explanation = explain(tiny_classifier, Example(picture, TEXT))
    lines = output.splitlines()
    assert f"{explanation.probability:.4f}" in lines[0]
    assert max(map(len, lines)) <= 80
    assert {character for character in output if not character.isprintable()} == {"\n"}
    rows = lines[-len(explanation.words) :]
    assert [row.split()[0] for row in rows[:4]] == ["Is", "the", "круг", "red"]
    largest = max(abs(value) for _, value in explanation.words)
    for row, (_, value) in zip(rows, explanation.words, strict=True):
        left, _, right = row.partition("|")
        bar = right if value > 0 else left.rpartition(" ")[2]
        assert bar == ("+" if value > 0 else "-") * round(22 * abs(value) / largest)


def test_json_is_the_explanation(classifier_folder, picture, tiny_classifier, capsys):
    assert run(classifier_folder, picture, TEXT, "--json") == 0
    output = capsys.readouterr().out
    assert output.isascii()
    content = json.loads(output)
    expected = explain(tiny_classifier, Example(picture, TEXT)).to_json()
    assert content.keys() == expected.keys()
    assert content["probability"] == pytest.approx(expected["probability"], abs=1e-3)
    assert [entry["word"] for entry in content["words"]] == [entry["word"] for entry in expected["words"]]


@pytest.mark.parametrize("baseline", ["average", "empty", None])
def test_the_baseline_is_chosen_and_named(tiny_classifier, picture, tmp_path, capsys, baseline):
    classifier = copy.copy(tiny_classifier)
    classifier.average = Image.new("RGB", (8, 8), (20, 120, 60))
    folder = classifier.save(tmp_path / "classifier")
    chosen = ["--baseline", baseline] if baseline else []
    assert run(folder, picture, "Is it red?", *chosen) == 0
    named = "an empty picture of one colour" if baseline == "empty" else "the average training picture"
    assert f"squares explain the difference from {named}" in " ".join(capsys.readouterr().out.split())
    assert run(folder, picture, "Is it red?", "--json", *chosen) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == (baseline or "average")


def test_a_classifier_without_an_average_picture_says_so(classifier_folder, picture):
    with pytest.raises(ConfigError, match=r"keeps no average picture.*baseline empty"):
        run(classifier_folder, picture, "Is it red?", "--baseline", "average")


def test_the_heat_map_is_written(classifier_folder, picture, capsys):
    out = picture.with_name("heat.png")
    assert run(classifier_folder, picture, "Is it red?", "--out", out) == 0
    assert "log odds" in capsys.readouterr().out
    with Image.open(out) as shaded:
        assert shaded.format == "PNG"
        assert shaded.width == 768
        assert shaded.height > 461 + 60, "the words are below the picture and its scale"
    assert sorted(path.name for path in picture.parent.iterdir()) == ["heat.png", "picture.png"]


def test_other_methods_further_pictures_and_none(classifier_folder, picture, capsys):
    out = picture.with_name("heat.png")
    assert run(classifier_folder, picture, "Is it red?", "--further", picture, "--method", "tokens", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (len(content["patches"]), content["method"]) == (2, "tokens")
    assert run(classifier_folder, "-", "Is it red?", "--out", out, "--method", "occlusion") == 0
    assert "by occlusion" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.size == (768, 5 * 24 + 12)


def test_an_isotonic_curve_is_spoken_of(tiny_classifier, picture, tmp_path, capsys):
    curved = copy.copy(tiny_classifier)
    curved.isotonic = ((0.0, 1.0), (0.1, 0.9))
    assert run(curved.save(tmp_path / "curved"), picture, "Is it red?") == 0
    assert "before the isotonic curve" in capsys.readouterr().out.splitlines()[1]


def test_expected_errors(classifier_folder, picture, tmp_path):
    for error, arguments in (
        (ArtifactError, (tmp_path / "none", picture, "x")),
        (ImageError, (classifier_folder, tmp_path / "none.png", "x")),
        (ConfigError, (classifier_folder, picture, "x", "--method", "magic")),
        (ConfigError, (classifier_folder, picture, "x", "--out", tmp_path / "heat.jpg")),
        (ConfigError, (classifier_folder, picture, "x", "--out", tmp_path / "none" / "heat.png")),
    ):
        with pytest.raises(error) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_the_heat_map_never_takes_the_place_of_the_picture(classifier_folder, picture, tmp_path):
    before = picture.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    for image, out in ((picture, picture), (picture, link), (link, tmp_path / "none" / ".." / "picture.png")):
        with pytest.raises(ConfigError, match="is the picture itself"):
            run(classifier_folder, image, "x", "--out", out)
    with pytest.raises(ConfigError, match="is the picture itself"):
        run(classifier_folder, "-", "x", "--further", picture, "--out", picture)
    assert picture.read_bytes() == before


def test_the_parser_loads_neither_torch_nor_pillow():
    code = (
        "import sys; from qwen_vl_classifier.cli.main import build_parser; build_parser();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'PIL', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
