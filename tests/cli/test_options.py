"""Flags that several verbs share: `--quantization`, from extraction to a loaded classifier."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.features.folder_contents import summarise
from qwen_vl_classifier.scenes.statements import write_dataset

FLAGS = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), split="test", name="train", seed=0, scenes=12, per_scene=2)


def test_a_classifier_on_a_quantised_backbone(data, tmp_path, capsys):
    out, store = tmp_path / "classifier", tmp_path / "features"
    options = ["--features", str(store), "--epochs", "1", *FLAGS]
    assert main(["train", str(data), "--out", str(out), "--quantization", "4bit", *options]) == 0
    small = Classifier.load(out, device="cpu")
    assert small.backbone.quantization == "4bit"
    capsys.readouterr()
    assert main(["predict", str(out), "-", "There is a star.", "--device", "cpu"]) == 0
    assert "probability" in capsys.readouterr().out
    # Features of the whole backbone lie beside those of the quantised one and are never taken for them.
    assert main(["extract", str(data), "--features", str(store), "--taps", str(small.tap), *FLAGS]) == 0
    assert "encoded 24 rows now" in capsys.readouterr().out
    assert len(summarise(store, progress=False)["backbones"]) == 2


def test_another_number_of_bits(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", str(data), "--out", str(tmp_path / "out"), "--quantization", "2bit"])
    assert end.value.code == 2
    assert "--quantization '2bit': expected one of 8bit, 4bit" in capsys.readouterr().err
