"""Rows whose pictures cannot be used: all are listed before or after the pass, or left out where that is allowed."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example, FeatureStore, TrainConfig, finetune, train
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import ConfigError, ImageError
from tests.tuning import LORA, ROWS, VALIDATION

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"taps": "mean:-1", "heads": "linear", "folds": 2}


def png(number: int, *, damaged: bool = False) -> bytes:
    """Return a picture; a damaged one has a sound header, and pixels that cannot be decoded."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    if damaged:
        start = content.index(b"IDAT")
        content[start + 4 : start + 40] = bytes(36)
    return bytes(content)


def rows(count=40, *, unreadable=(), damaged=()) -> list[Example]:
    return [
        Example(
            b"no picture" if number in unreadable else png(number, damaged=number in damaged),
            f"text {number}",
            number % 2,
        )
        for number in range(count)
    ]


@pytest.fixture
def encoded(tiny_backbone, monkeypatch) -> list[int]:
    calls: list[int] = []
    encode = tiny_backbone.encode_prepared
    monkeypatch.setattr(
        tiny_backbone,
        "encode_prepared",
        lambda prepared, *more, **options: calls.append(len(prepared)) or encode(prepared, *more, **options),
    )
    return calls


def fit(examples, backbone, validation=None, store=None, **options):
    config = TrainConfig(**OPTIONS | options)
    return train(examples, validation, backbone=backbone, config=config, store=store, progress=False)


def test_headers_are_read_before_anything_is_computed(tiny_backbone, encoded):
    bad = range(0, 36, 3)
    with pytest.raises(ImageError) as caught:
        fit(rows(unreadable=bad, damaged=[1]), tiny_backbone)
    lines = str(caught.value).splitlines()
    assert lines[0] == "12 of 40 training rows cannot be used:"
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"row {row + 1}" for row in bad[:10]]
    assert lines[11] == "  and 2 more"
    assert lines[12] == "Correct these rows or take them out, then run again, or leave them out with max_errors=."
    assert encoded == []


def test_those_of_validation_too(tiny_backbone, encoded):
    with pytest.raises(ImageError, match="1 of 10 validation rows cannot be used:\n  row 5: "):
        fit(rows(), tiny_backbone, rows(10, unreadable=[4]))
    assert encoded == []


def test_damage_that_decoding_shows_is_listed_after_the_pass_and_the_rest_is_kept(tiny_backbone, encoded, tmp_path):
    examples = rows(damaged=[2, 30])
    store = FeatureStore(tmp_path)
    with pytest.raises(ImageError, match=r"^2 of 40 training rows cannot be used:\n  row 3: .*\n  row 31: "):
        fit(examples, tiny_backbone, store=store)
    assert sum(encoded) == len(store) == 38
    encoded.clear()
    result = fit(examples, tiny_backbone, store=store, max_errors=2)
    assert encoded == []
    assert result.classifier.training["training_rows"] == 38


@pytest.mark.parametrize("max_errors", [3, pytest.param("3", marks=pytest.mark.soak), "7.5%"])
def test_rows_are_left_out_where_that_is_allowed_and_the_record_says_so(tiny_backbone, max_errors):
    examples = rows(unreadable=[0, 20], damaged=[7])
    result = fit(examples, tiny_backbone, max_errors=max_errors)
    record = result.classifier.training
    (left_out,) = record["left_out"]
    assert {name: left_out[name] for name in ("total", "of", "positions")} == {
        "total": 3,
        "of": 40,
        "positions": [0, 7, 20],
    }
    assert [line.split(":")[0] for line in left_out["lines"]] == ["row 1", "row 8", "row 21"]
    note = "3 of 40 training rows cannot be used and were left out: row 1, row 8, row 21"
    assert note in record["notes"]
    assert f"Note: {note}" in " ".join(str(result).split())
    assert record["training_rows"] == 37
    good = [row for number, row in enumerate(examples) if number not in (0, 7, 20)]
    alone = fit(good, tiny_backbone)
    np.testing.assert_allclose(
        result.classifier.predict_proba(good), alone.classifier.predict_proba(good), rtol=1e-3, atol=1e-4
    )


def test_more_than_allowed_are_an_error(tiny_backbone):
    with pytest.raises(ImageError, match=r"^3 of 40 training rows cannot be used") as caught:
        fit(rows(unreadable=[0, 20], damaged=[7]), tiny_backbone, max_errors=2)
    assert str(caught.value).endswith("then run again; max_errors=2 allows fewer.")


@pytest.mark.parametrize("value", ["many", "-1", "101%", "0.5"])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="max_errors"):
        TrainConfig(max_errors=value)


def test_probabilities_stay_beside_their_rows_so_all_bad_rows_are_one_error(tiny_classifier):
    with pytest.raises(ImageError, match=r"^2 of 9 rows cannot be used:\n  row 2: .*\n  row 6: "):
        tiny_classifier.predict_proba(rows(9, unreadable=[1, 5], damaged=[3]))
    with pytest.raises(ImageError, match=r"^1 of 9 rows cannot be used:\n  row 4: "):
        tiny_classifier.predict_proba(rows(9, damaged=[3]))


def test_the_command_line_names_lines_and_its_flag(tmp_path, capsys):
    lines = []
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(png(number, damaged=number == 7) if number != 3 else b"<html>")
        lines.append(json.dumps({"image": f"{number}.png", "text": f"text {number}", "label": number % 2}))
    lines[5:5] = ["", ""]  # line numbers are not positions
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines) + "\n")
    arguments = ["train", str(data), "--out", str(tmp_path / "out"), "--taps", "mean:-1", "--heads", "linear"]
    arguments += ["--folds", "2", "--device", "cpu"]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "1 of 40 training rows cannot be used:\n  line 4: " in told
    assert "or leave them out with --skip-bad-rows" in told
    assert main([*arguments, "--max-errors", "5%"]) == 0
    told = capsys.readouterr()
    assert "left out 2 of 40 training rows:\n  line 4: " in told.err
    assert "\n  line 10: " in told.err
    note = "Note: 2 of 40 training rows cannot be used and were left out: line 4, line 10"
    assert note in " ".join(told.out.split())


def test_finetuning_decodes_all_pictures_before_it_trains(start, monkeypatch):
    bad = Example(png(99, damaged=True), "It is red.", 1)
    examples, validation = [*ROWS[:8], bad, *ROWS[8:]], [*VALIDATION, bad, bad]
    config = replace(LORA, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(start.backbone, "encode_prepared", lambda *_, **__: pytest.fail("the model ran"))
        with pytest.raises(ImageError, match=r"^1 of 17 training rows cannot be used:\n  row 9: "):
            finetune(start, examples, validation, config=config, progress=False)
        with pytest.raises(ImageError, match=r"^2 of 14 validation rows cannot be used:\n  row 13: .*\n  row 14: "):
            finetune(start, examples, validation, config=replace(config, max_errors="8%"), progress=False)
    result = finetune(start, examples, validation, config=replace(config, max_errors=2), progress=False)
    assert [(one["total"], one["of"], one["what"]) for one in result.left_out] == [
        (1, 17, "training rows"),
        (2, 14, "validation rows"),
    ]
    assert "1 of 17 training rows cannot be used and were left out: row 9" in result.notes
    assert result.improved
    assert result.classifier.training["left_out"] == list(result.left_out)
    assert result.classifier.training["training_rows"] == 16


def test_pictures_that_are_not_there_count_where_rows_may_be_left_out(tmp_path, capsys):
    lines = []
    for number in range(40):
        if number not in (3, 9):
            (tmp_path / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"image": f"{number}.png", "text": f"text {number}", "label": number % 2}))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines) + "\n")
    arguments = ["train", str(data), "--out", str(tmp_path / "out"), "--taps", "mean:-1", "--heads", "linear"]
    arguments += ["--folds", "2", "--device", "cpu"]
    assert main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*arguments, "--max-errors", "2"]) == 0
    assert "left out 2 of 40 training rows:\n  line 4: " in capsys.readouterr().err
    outside = json.dumps({"image": "../gone.png", "text": "outside", "label": 1})
    data.write_text("\n".join([*lines, outside]) + "\n")
    assert main([*arguments, "--max-errors", "2", "--overwrite"]) == 2
    assert "--max-errors 2 allows fewer" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad-rows", "--overwrite"]) == 0
    told = capsys.readouterr().err
    assert "left out 3 of 41 training rows:\n  line 4: " in told
    assert "--allow-outside" in told
