"""Flags that say which pictures are accepted, on every verb that reads pictures, and in worker processes too."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.cli.main import build_parser, main
from qwen_vl_classifier.images.limits import DEFAULT_LIMITS, current_limits

READING = ("train", "finetune", "evaluate", "predict", "explain", "score", "extract")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_classifier):
    return tiny_classifier.save(tmp_path_factory.mktemp("saved") / "classifier")


@pytest.mark.parametrize("verb", READING)
def test_every_verb_that_reads_pictures_has_the_flags(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help-all"])
    flags = capsys.readouterr().out
    for flag in ("--max-image-pixels", "--max-image-bytes", "--grey-bits"):
        assert flag in flags


def test_serve_takes_the_same_name_for_its_limit():
    for flag in ("--max-image-pixels", "--max-pixels"):
        assert build_parser().parse_args(["serve", "folder", flag, "77"]).max_pixels == 77


def test_a_larger_picture_is_let_in_by_a_flag(folder, tmp_path, capsys):
    Image.linear_gradient("L").resize((5001, 5001)).save(tmp_path / "large.jpg")
    arguments = ["predict", str(folder), str(tmp_path / "large.jpg"), "There is a star.", "--device", "cpu"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert (
        "5001x5001, 25,010,001 pixels; expected at most 25,000,000; scale it down or raise --max-image-pixels"
        in message
    )
    assert main([*arguments, "--max-image-pixels", "30000000"]) == 0
    assert "probability" in capsys.readouterr().out
    assert main([*arguments, "--max-image-pixels", "0"]) == 2
    assert current_limits() == DEFAULT_LIMITS


def scoring(folder, place, workers) -> list[str]:
    """Write a grey picture of 12 bits and a table that names it, and return the words that score it in CSV."""
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint16) * 60, (40, 1))).save(place / "xray.png")
    (place / "rows.csv").write_text("id,image,text\na,xray.png,words\nb,../x.png,words\n")
    words = ["score", str(folder), str(place / "rows.csv"), "--out", str(place / "out"), "--format", "csv"]
    return [*words, "--device", "cpu", "--workers", str(workers), "--threads", "1"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_limits_reach_the_workers_of_score(folder, tmp_path, capsys, workers):
    words = scoring(folder, tmp_path, workers)
    assert main([*words, "--grey-bits", "12"]) == 0
    assert "2 rows, 1 of them with an error" in capsys.readouterr().out
    with (tmp_path / "out" / "shards" / "000000.csv").open() as file:
        first, second = csv.DictReader(file)
    assert not first["error"]
    assert "add --allow-outside" in second["error"]
    assert main(words) == 2
    assert "pictures" in capsys.readouterr().err, "scores with other pictures are not mixed"


@pytest.mark.soak
def test_workers_of_score_name_flags_in_errors(folder, tmp_path):
    assert main(scoring(folder, tmp_path, 1)) == 0
    with (tmp_path / "out" / "shards" / "000000.csv").open() as file:
        first, _ = csv.DictReader(file)
    assert first["error_code"] == "image_format"
    assert "--grey-bits 12 (scales from 0..4095)" in first["error"]
