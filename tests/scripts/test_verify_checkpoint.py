"""The script that compares a checkpoint with transformers says OK where all is well, and DIFFERS where it is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.processor import Processor
from tests import each_family, nano
from tests.backbone.prompts.chat_templates import QWEN_3_8, QWEN_3_VL_THINKING

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "verify_checkpoint.py"
QUICK = ("--device", "cpu", "--rows", "4", "--max-pixels", "12544")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("verify_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify_checkpoint"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["verify_checkpoint"]


def rows_of(table: str) -> dict[str, str]:
    lines = table.splitlines()
    assert lines[:2] == ["| | |", "|---|---|"]
    return dict(line.strip("| ").split(" | ", maxsplit=1) for line in lines[2:])


@pytest.mark.parametrize("family", each_family.FAMILIES)
def test_generated_checkpoints_agree(script, family, tmp_path, capsys):
    shards, tied = [(3, False), (1, True)][nano.FAMILIES.index(family) % 2]
    folder = nano.make_checkpoint(family, tmp_path / family, shards=shards, tied=tied)
    assert script.main([str(folder), "--dtype", "float32", *QUICK]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["checkpoint"] == family  # the folder's name, not where it lies
    assert rows["token ids"] == rows["pixel values"] == "equal"
    assert {"`mean:-1`", "`last:-1`", "`image:-1`", "`text:-1`", "`mean:2`", "`last:2`"} < rows.keys()
    assert rows["zero-shot"].endswith("on 4 scenes, half of them true")
    assert rows["verdict"] == "**OK** (expected: equal inputs, difference <= 1e-05 of scale)"


def test_a_checkpoint_without_a_template_is_compared_under_ours(script, tmp_path, capsys):
    folder = nano.make_checkpoint("qwen3_vl", tmp_path / "bare", chat_template=False)
    assert script.main([str(folder), "--dtype", "float32", *QUICK]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["compared with"].endswith("our chat template as it has none; 6 examples")


@pytest.mark.parametrize(
    ("family", "template"),
    [("qwen3_5", QWEN_3_8), pytest.param("qwen3_vl", QWEN_3_VL_THINKING, marks=pytest.mark.soak)],
)
def test_thinking_is_turned_off_in_both(script, family, template, tmp_path, capsys):
    folder = nano.make_checkpoint(family, tmp_path / "thinks", chat_template=False)
    (folder / "chat_template.jinja").write_text(template)
    assert script.main([str(folder), "--dtype", "float32", *QUICK]) == 0
    assert rows_of(capsys.readouterr().out)["token ids"] == "equal"


def test_bfloat16_is_held_to_a_cosine(fresh):
    done = fresh.run(SCRIPT, "builtin:tiny", "--dtype", "bfloat16", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "| verdict | **OK** (expected: equal inputs, cosine >= 0.9995) |" in done.stdout
    assert done.stderr == ""


def a_weight(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.model.language_model.layers[1].mlp.down_proj.weight[3, 5] += 0.01


def the_template(backbone: Backbone) -> None:
    processor = backbone.processor
    backbone.processor = Processor(
        processor.tokenizer,
        processor.image_processor,
        chat_template=processor.chat_template.replace("assistant", "Assistant"),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )


def the_pictures(backbone: Backbone) -> None:
    backbone.processor.image_processor.image_mean = [0.5, 0.5, 0.4]


@pytest.mark.parametrize(
    ("spoil", "differing"),
    [
        (a_weight, {"`mean:-1`", "`last:-1`", "`mean:2`", "verdict"}),
        (the_template, {"token ids", "`last:-1`", "verdict"}),
        (the_pictures, {"pixel values", "`image:-1`", "verdict"}),
    ],
)
def test_what_differs_is_named(script, spoil, differing, tmp_path, capsys, monkeypatch):
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path / "checkpoint")

    def load(*arguments, **options):
        backbone = Backbone.load(*arguments, **options)
        spoil(backbone)
        return backbone

    monkeypatch.setattr(script, "Backbone", type("Spoilt", (), {"load": staticmethod(load)}))
    assert script.main([str(folder), "--dtype", "float32", *QUICK]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert differing <= {name for name, value in rows.items() if "differ" in value.lower() and "**" in value}
    assert rows["verdict"].startswith("**DIFFERS**")


def test_without_a_language_head_there_is_no_zero_shot(script, tmp_path, capsys):
    folder = nano.make_checkpoint("qwen3_vl", tmp_path / "whole")
    Backbone.load(folder, device="cpu", dtype="float32").save(tmp_path / "headless")
    assert script.main([str(tmp_path / "headless"), "--dtype", "float32", *QUICK]) == 0
    assert rows_of(capsys.readouterr().out)["zero-shot"].startswith("none: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["builtin:huge"], "builtin:huge"),
        (["builtin:tiny", "--rows", "3"], "--rows 3"),
        (["builtin:tiny", "--dtype", "float16"], "float16 overflows"),
        (["builtin:tiny", "--max-pixels", "1"], "max_pixels 1"),
    ],
)
def test_expected_errors_are_one_line(script, arguments, message, capsys):
    assert script.main(arguments) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    assert message in seen.err
