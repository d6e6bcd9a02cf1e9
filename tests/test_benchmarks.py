"""Benchmarks run; the encoder's judges by its targets and counts operations as torch does. Nothing is timed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Let the modules of the benchmarks be imported, as a script there does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.soak
def test_every_row_is_measured_with_the_same_features(tmp_path, fresh):
    out = tmp_path / "lines.jsonl"
    done = fresh.run(BENCHMARKS / "encoder.py", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == lines
    cosines = [line["notes"]["least_cosine"] for line in lines if "least_cosine" in line.get("notes", {})]
    assert min(cosines) >= 0.9995
    unmeasured = [line for line in done.stdout.splitlines() if "not measured" in line]
    if done.stderr.startswith("sentence-transformers left out: "):
        assert (len(cosines), len(unmeasured)) == (7, 2)
        assert all("sentence-transformers" in line for line in unmeasured)
        assert done.stderr.count("\n") == 1
    else:
        assert (len(cosines), unmeasured) == (9, [])
        assert find_spec("sentence_transformers")
    profiles = [line["milliseconds"] for line in lines if line["row"] == "profile"]
    assert len(profiles) == 2
    for stages in profiles:
        assert sum(stages.values()) == pytest.approx(2 * stages["encode"])


@pytest.mark.soak
def test_families_are_compared_with_the_same_features(monkeypatch, capsys):
    import encoder

    options = ("--quick", "--family", "qwen3_5", "qwen3_vl_moe", "--rows", "shared", "--dtypes", "float32")
    monkeypatch.setattr("sys.argv", ["encoder.py", *options])
    encoder.main()
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in printed if line.startswith("{")]
    assert [(line["family"], line["row"]) for line in lines] == [("qwen3_5", "shared"), ("qwen3_vl_moe", "shared")]
    assert min(line["least_cosine"] for line in lines) >= 0.9995
    assert len([line for line in printed if line.startswith("| ") and "float32" in line]) == len(lines)


def test_families_have_rows_of_their_own(monkeypatch, capsys):
    import encoder

    monkeypatch.setattr("sys.argv", ["encoder.py", "--family", "qwen3_5", "--rows", "half"])
    with pytest.raises(SystemExit):
        encoder.main()
    assert "--rows half: expected some of shared texts unique" in capsys.readouterr().err


def test_a_target_of_families_holds_against_both_ways_of_running_transformers():
    from encoder_families import FamilyMeasured

    def met(row: str, one_by_one: float, batches: float) -> bool | None:
        seconds = {"one by one": one_by_one, "batches": batches, "encoder": 1.0}
        return FamilyMeasured("qwen3_5", "", row, "float32", 100, seconds, 1.0).met

    assert met("shared", 5.0, 6.0)
    assert not met("shared", 6.0, 4.9)
    assert met("texts", 1.0, 1.0) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_shape_whose_model_can_be_built(family):
    from family_checkpoints import FAMILY_SHAPES, configuration

    model_class = FAMILIES[family].load_class()
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(configuration(FAMILY_SHAPES[family])))
    assert 3e7 < sum(weight.numel() for weight in model.parameters()) < 1e9


def test_targets_judge_both_ways():
    from encoder import Goal

    assert Goal("row", "float32", "work", 1.5).met(1.5)
    assert not Goal("row", "float32", "work", 1.5).met(1.4)
    assert Goal("row", "float32", "work", 0.62, at_most=True).met(0.62)
    assert not Goal("row", "float32", "work", 0.62, at_most=True).met(0.63)
    assert Goal("row", "float32", "work", None).met(2.0) is None


def test_the_plain_loop_makes_the_tensors_that_the_backbone_reads(tmp_path):
    from checkpoints import SHAPES, write_checkpoint
    from encoder_baselines import PlainLoop
    from pictures import examples, texts

    folder = write_checkpoint(SHAPES["nano"], tmp_path / "nano")
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    plain = PlainLoop(folder, backbone.processor, dtype=torch.float32, device=torch.device("cpu"), batch_size=8)
    rows = [*examples(2, [(84, 84), (140, 112)], (5, 9)), *texts(1, 12)]
    theirs, ours = plain.inputs(rows), backbone.processor(rows)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)


def test_contenders_take_turns_and_the_first_round_does_not_count():
    from racing import race

    calls: list[str] = []
    times = race({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert "".join(calls) == "abababab"
    assert {name: len(taken.seconds) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_operations_of_linear_layers_are_those_that_torch_counts(tmp_path):
    from checkpoints import SHAPES, write_checkpoint
    from flops import linear_flops, products
    from pictures import examples

    backbone = Backbone.load(write_checkpoint(SHAPES["nano"], tmp_path / "nano"), device="cpu", dtype="float32")
    inputs = backbone.processor(examples(2, [(84, 84), (140, 84)], (5, 9)))
    # With gradients on, transformers' own layers run: torch does not count the operators that fuse them.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        backbone.model(**inputs)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(
        count for operation, count in counted.items() if str(operation) in ("aten.mm", "aten.addmm", "aten.convolution")
    )
    patches, tokens = len(inputs["pixel_values"]), inputs["input_ids"].numel()
    assert linear_flops(products(SHAPES["nano"], patches, tokens)) == linear


def test_operations_of_attention_are_four_times_width_for_each_pair():
    from checkpoints import SHAPES
    from flops import attention_flops

    shape = SHAPES["nano"]  # one vision layer of three sees the whole picture
    # 10 x 8 patches are windows of 8 x 8 and 2 x 8.
    vision = 4 * shape.vision.hidden * ((10 * 8) ** 2 + 2 * ((8 * 8) ** 2 + (2 * 8) ** 2))
    decoder = 4 * shape.text.hidden * shape.text.layers * (1 + 2 + 3)
    assert attention_flops(shape, [(10, 8)], [3]) == vision + decoder


@pytest.mark.parametrize(("name", "millions"), [("59m", 59.4), ("3b", 3754.6)])
def test_shapes_have_the_parameters_that_are_said(name, millions):
    import transformers
    from checkpoints import SHAPES, configuration

    with torch.device("meta"):
        config = transformers.Qwen2_5_VLConfig.from_dict(configuration(SHAPES[name]))
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_tables_go_between_their_marks(tmp_path):
    from tables import put_table

    document = tmp_path / "page.md"
    document.write_text("a\n<!-- cpu begins -->\nold\n<!-- cpu ends -->\nb\n")
    put_table(document, "cpu", ["new", "lines"])
    assert document.read_text() == "a\n<!-- cpu begins -->\nnew\nlines\n<!-- cpu ends -->\nb\n"


def test_the_page_has_every_mark():
    page = (ROOT / "docs" / "figures" / "performance.md").read_text(encoding="utf-8")
    for part in ("cpu", "cpu profile", "families", "gpu", "gpu kernels"):
        assert page.index(f"<!-- {part} begins -->\n") < page.index(f"<!-- {part} ends -->\n")


@pytest.mark.soak
def test_the_benchmark_of_the_search_runs(fresh):
    options = ("--rows", "60", "--taps", "3", "--width", "12", "--loop-taps", "1")
    done = fresh.run(BENCHMARKS / "search.py", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["candidates"] > 30
    assert "extrapolated from 1" in done.stdout


@pytest.mark.soak
def test_the_benchmark_of_the_panel_runs(fresh):
    done = fresh.run(BENCHMARKS / "panel.py", "--rows", "3", "--heads", "7", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["what"] for line in lines[:2]] == ["one head", "7 linear heads, one tap"]
    assert lines[0]["ratio"] == 1
    done = fresh.run(BENCHMARKS / "panel.py", "--rows", "12", "--heads", "2", "--train")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["what"] for line in done.stdout.splitlines()][1:] == ["one label", "2 labels"]


@pytest.mark.soak
def test_the_benchmark_of_attacks_runs(fresh):
    options = ("--shape", "nano", "--seconds", "2", "small_chunks", "unknown_fields", "mixed")
    done = fresh.run(BENCHMARKS / "attacks.py", *options)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[-3:]] == ["| small chunks", "| unknown fields", "| mixed"]


def test_what_preparing_pictures_costs_is_printed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import preparing

    monkeypatch.setattr("sys.argv", ["preparing.py", "--quick", "--device", "cpu"])
    preparing.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| 56 x 56 |")]) == 2
    assert lines[-1].startswith("of which the model had no pictures for ")
