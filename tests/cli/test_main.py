"""The command line: every verb that later tests do not cover, and how errors end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_vl_classifier import Classifier, load_examples
from qwen_vl_classifier.cli.main import VERBS, build_parser, main
from qwen_vl_classifier.scenes.statements import write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        name: write_dataset(folder, split="test", name=name, seed=seed, scenes=20, per_scene=2)
        for seed, name in enumerate(("train", "dev"))
    }


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "classifier"
    flags = ["--epochs", "3", "--features", str(out.parent / "features"), "--validation", str(data["dev"])]
    assert main(["train", str(data["train"]), "--out", str(out), *flags]) == 0
    return out


def run(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def fail(capsys, *arguments: str) -> str:
    """Run into an expected error and return its one line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"qwen-vl-classifier {arguments[0]}: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_every_verb_has_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            build_parser().parse_args([verb, "--help"])
        assert end.value.code == 0
        assert "usage: qwen-vl-classifier" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("qwen-vl-classifier ")


def test_train_saves_a_classifier_with_every_tap_that_was_tried(trained):
    classifier = Classifier.load(trained, device="cpu")
    assert classifier.training["training_rows"] == 40
    assert classifier.training["held_out_rows"] == 40
    assert classifier.training["estimate"]["method"] == "held-out rows"
    tried = {(row["tap"], row["head"]) for row in classifier.training["table"]}
    assert {("mean:-1", "linear"), ("mean:-1", "mlp"), ("last:-1", "zero-shot"), ("image:3", "linear")} <= tried
    assert classifier.training["options"]["epochs"] == 3


def test_train_with_kept_features_is_the_same_classifier(data, trained, tmp_path, monkeypatch):
    from qwen_vl_classifier import Backbone

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the backbone ran though all features are kept")

    monkeypatch.setattr(Backbone, "encode_prepared", refuse)
    again = tmp_path / "again"
    flags = ["--epochs", "3", "--features", str(trained.parent / "features"), "--validation", str(data["dev"])]
    assert main(["train", str(data["train"]), "--out", str(again), *flags]) == 0
    assert (again / "head.safetensors").read_bytes() == (trained / "head.safetensors").read_bytes()


def test_evaluate_prints_a_table_and_writes_a_report(capsys, data, trained, tmp_path):
    output = run(capsys, "evaluate", str(trained), str(data["dev"]), "--out", str(tmp_path / "report"))
    assert "of 40 rows" in output
    assert max(map(len, output.splitlines()[:25])) <= 80
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    wanted = Classifier.load(trained).predict_proba(load_examples(data["dev"]))[:, 1]
    assert [row["probability"] for row in evaluation["predictions"]] == wanted.tolist()
    assert (tmp_path / "report" / "report.html").is_file()


def test_predict_says_what_the_classifier_says(capsys, data, trained):
    example = load_examples(data["dev"])[0]
    output = run(capsys, "predict", str(trained), str(example.images[0]), example.text, "--json")
    answer = json.loads(output)
    classifier = Classifier.load(trained)
    assert answer["probability"] == classifier.predict_proba([example])[0, 1]
    assert answer["decision"] == ("yes" if answer["label"] else "no")
    assert "probability" in run(capsys, "predict", str(trained), "-", "text alone")


def test_info_describes_each_kind_of_thing(capsys, trained):
    assert "fingerprint" in run(capsys, "info", str(trained))
    assert "Qwen2.5-VL" in run(capsys, "info", "builtin:tiny")
    assert "shards" in run(capsys, "info", str(trained.parent / "features"))
    assert "torch" in run(capsys, "info")


def test_finetune_from_a_classifier(capsys, data, trained, tmp_path):
    flags = ["--from", str(trained), "--out", str(tmp_path / "tuned"), "--epochs", "1", "--batch-size", "20"]
    output = run(capsys, "finetune", str(data["train"]), *flags, "--validation", str(data["dev"]))
    assert "validation log loss" in output
    Classifier.load(tmp_path / "tuned", device="cpu")


def test_labels_that_are_words(capsys, data, tmp_path):
    rows = [json.loads(line) for line in data["train"].read_text().splitlines()]
    for row in rows:
        row["label"] = "true" if row["label"] else "false"
    worded = data["train"].with_name("worded.jsonl")
    worded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "classifier"
    run(capsys, "train", str(worded), "--positive", "true", "--out", str(out), "--epochs", "1", "--taps", "mean:-1")
    assert Classifier.load(out, device="cpu").label_names == ("false", "true")


def test_expected_errors_are_one_line_and_status_2(capsys, data, trained, tmp_path):
    train = str(data["train"])
    assert "no_such" in fail(capsys, "train", "no_such.jsonl", "--out", str(tmp_path / "x"))
    assert "--learning-rate -1.0: give" in fail(
        capsys, "train", train, "--out", str(tmp_path / "x"), "--learning-rate", "-1"
    )
    assert "tap" in fail(capsys, "train", train, "--out", str(tmp_path / "x"), "--taps", "mean:99")
    assert "builtin:huge" in fail(capsys, "train", train, "--out", str(tmp_path / "x"), "--model", "builtin:huge")
    hub = fail(capsys, "train", train, "--out", str(tmp_path / "x"), "--model", "Qwen/Qwen2.5-VL-3B-Instruct")
    assert "hub cannot be reached" in hub
    assert "classifier.json" in fail(capsys, "evaluate", str(tmp_path), train)
    assert "missing.png" in fail(capsys, "predict", str(trained), "missing.png", "text")
    assert not (tmp_path / "x").exists()


def test_a_defect_keeps_its_traceback(monkeypatch, trained):
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("qwen_vl_classifier.classifier.artifact.read_manifest", break_down)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(trained)])


def test_a_closed_pipe_is_no_error(trained):
    command = f"{sys.executable} -m qwen_vl_classifier info {trained.parent / 'features'} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_an_interrupt_is_one_line(data, tmp_path, fresh):
    code = (
        "import os, signal, sys\n"
        "from qwen_vl_classifier.cli.main import main\n"
        "import qwen_vl_classifier.training.probe.probe as probe\n"
        "probe.train = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = fresh.run(code, "train", data["train"], "--out", tmp_path / "x")
    assert done.returncode == 130
    assert done.stderr.strip().splitlines()[-1] == "qwen-vl-classifier train: interrupted"


def test_soft_labels_and_weights_of_classes_come_from_flags(tmp_path, capsys):
    rows = [{"image": None, "text": f"claim {number}", "label": 0.2 + 0.6 * (number % 2)} for number in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--out", str(tmp_path / "made"), "--taps", "mean:2", "--heads", "linear"]
    assert main(["train", str(data), *flags]) == 2
    assert "expected 0 or 1" in capsys.readouterr().err
    assert main(["train", str(data), *flags, "--soft-labels", "--class-weight", "0:1,1:3"]) == 0
    assert "on new rows" in capsys.readouterr().out
    made = Classifier.load(tmp_path / "made", device="cpu")
    assert made.training["options"]["class_weight"] == {"0": 1.0, "1": 3.0}
