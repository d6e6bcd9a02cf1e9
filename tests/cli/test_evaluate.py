"""`evaluate` on the command line: its grammar, its flags, and the comparison of two classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vl_classifier import Backbone, Classifier, progress_bars
from qwen_vl_classifier.backbone import windows
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data import picture_checks
from qwen_vl_classifier.evaluation import intervals
from qwen_vl_classifier.scenes.statements import write_dataset

QUICK = ("--resamples", "50", "--slice-rows", "5")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), split="test", scenes=12, per_scene=2)


@pytest.fixture(scope="module")
def saved(tiny_classifier, tmp_path_factory) -> Path:
    return tiny_classifier.save(tmp_path_factory.mktemp("saved") / "classifier")


@pytest.fixture(scope="module")
def other(tiny_backbone, tmp_path_factory) -> Path:
    return Classifier.zero_shot(tiny_backbone).save(tmp_path_factory.mktemp("other") / "zero_shot")


def run(capsys, *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments), *QUICK]) == 0
    return capsys.readouterr().out


def fail(capsys, *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments), *QUICK]) == 2
    return capsys.readouterr().err


def test_one_classifier_is_measured_checked_and_sliced(capsys, data, saved):
    output = run(capsys, saved, data, "--slice-by", "kind", "--train", data, "--features", saved.parent / "features")
    assert max(map(len, output.splitlines())) <= 80
    words = " ".join(output.split())
    assert "of 24 rows" in words
    assert "other pictures" in words
    assert "the pictures of 24 rows are in the training data" in words
    assert "kind: " in words


def test_the_data_may_be_named(capsys, data, saved):
    assert run(capsys, saved, data, "--no-checks") == run(capsys, saved, "--data", data, "--no-checks")


def test_checks_can_be_left_out(capsys, data, saved):
    output = run(capsys, saved, data, "--no-checks")
    assert "not checked whether it uses pictures and texts: switched off" in output
    assert output.startswith("Right on")


def test_a_limit_is_not_one_of_the_training_data(capsys, data, saved):
    rows = data.read_text().splitlines()
    turned = data.with_name("turned.jsonl")
    turned.write_text("\n".join(rows[::-1]) + "\n")
    output = " ".join(run(capsys, saved, data, "--limit", "5", "--train", turned, "--no-checks").split())
    assert "the pictures of 5 rows are in the training data" in output


def test_two_classifiers_are_compared(capsys, data, saved, other, tmp_path):
    output = run(capsys, saved, other, data, "--out", tmp_path / "made")
    assert max(map(len, output.splitlines()[:-1])) <= 80
    assert "McNemar" in output
    comparison = json.loads((tmp_path / "made" / "comparison.json").read_text())
    assert [one["name"] for one in comparison["classifiers"]] == ["classifier", "zero_shot"]
    assert [one["folder"] for one in comparison["classifiers"]] == [str(saved), str(other)]
    assert comparison["classifiers"][1]["tap"] == "last:-1"
    assert comparison["measured"]["data"] == str(data)
    again = run(capsys, saved, other, "--data", data)
    assert again == output[: output.index("\ncomparison")]


def test_any_number_is_compared_each_backbone_loaded_once(
    capsys, data, saved, other, tiny_classifier, tmp_path, monkeypatch
):
    third = tiny_classifier.save(tmp_path / "third" / "classifier")
    loaded = []
    load = Backbone.load
    monkeypatch.setattr(Backbone, "load", lambda *given, **options: loaded.append(given) or load(*given, **options))
    output = run(capsys, saved, other, third, data)
    assert len(loaded) == 1
    assert max(map(len, output.splitlines())) <= 80
    assert "Holm" in output
    assert "A against C" in output or "C against A" in output


def test_what_is_missing_or_too_much_is_said(capsys, data, saved, other, tmp_path):
    assert "expected one or more saved classifiers, then the data" in fail(capsys, saved)
    assert "is given twice; expected different classifiers" in fail(capsys, saved, saved, data)
    assert "no row has a column 'sort'" in fail(capsys, saved, data, "--slice-by", "sort")
    assert "no_such.jsonl" in fail(capsys, saved, data, "--train", "no_such.jsonl")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in fail(capsys, saved, other, data, "--out", blocked)


def test_help_shows_every_way_to_call(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert "evaluate CLASSIFIER ... DATA" in shown
    assert "evaluate CLASSIFIER ... --data DATA" in shown


def test_each_bar_says_what_it_does(capsys, data, saved, monkeypatch):
    titles = []
    bar = progress_bars.tqdm

    def noted(*given, **named):
        titles.append(named["desc"])
        return bar(*given, **named)

    for module in (windows, picture_checks, intervals):
        monkeypatch.setattr(module, "tqdm", noted)
    run(capsys, saved, data, "--train", data, "--limit", "6")
    assert list(dict.fromkeys(titles)) == [
        "read picture headers",
        "read training headers",
        "score rows",
        "score changed rows",
        "decode training pictures",
        "bootstrap",
    ]
