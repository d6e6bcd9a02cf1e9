"""Fine-tuning of families with linear attention and with experts: runs go on bit by bit, and what trains is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, FinetuneConfig, Tap, finetune
from qwen_vl_classifier.training.finetuning.final_classifier import Answers
from qwen_vl_classifier.training.finetuning.starting_point import changes_of
from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer
from tests.tuning import FULL, LORA, ROWS, VALIDATION, assert_same, snapshot, start_at

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "full": replace(FULL, towers="llm"),
    "lora": replace(LORA, towers="llm", adapter_dropout=0.1),
    "qlora": replace(LORA, method="qlora", towers="llm", adapter_dropout=0.1),
}
FAILING = 3  # the step after the first epoch's two and one more


def start_of(folder: Path, config: FinetuneConfig) -> Classifier:
    quantization = "4bit" if config.method == "qlora" else None
    backbone = Backbone.load(folder, device="cpu", dtype="float32", quantization=quantization)
    return start_at(backbone, Tap(-1, "mean"))


def check_run(folder: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIGS[method], save_steps=1, patience=0)
    start = start_of(folder, config)
    before = snapshot(start)
    whole = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert whole.improved
    inner = FinetuneTrainer.training_step

    def failing(self, *arguments):
        if self.state.global_step == FAILING:
            raise RuntimeError("the disk, the net, the dog")
        return inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", failing)
        with pytest.raises(RuntimeError, match="the dog"):
            finetune(start, ROWS, VALIDATION, config=config, run=tmp_path / "run", progress=False)
    result = finetune(start, ROWS, VALIDATION, config=config, run=tmp_path / "run", resume=True, progress=False)
    after = snapshot(result.classifier)
    assert_same(after, snapshot(whole.classifier))
    arrays = [name for name in before if name.endswith(("experts.gate_up_proj", "mlp.gate.weight", "A_log"))]
    assert arrays
    for name in arrays:
        assert torch.equal(before[name], after[name]) == (method != "full"), name
    loaded = Classifier.load(result.classifier.save(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(
        loaded.predict_proba(VALIDATION), result.classifier.predict_proba(VALIDATION), rtol=0, atol=1e-6
    )


def test_a_run_goes_on_bit_by_bit(nano_folder, tmp_path, monkeypatch):
    check_run(nano_folder("qwen3_5_moe"), "full", tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_a_run_of_any_of_them_goes_on_bit_by_bit(family, method, nano_folder, tmp_path, monkeypatch):
    check_run(nano_folder(family), method, tmp_path, monkeypatch)


def test_a_note_says_that_experts_do_not_train(nano_folder):
    notes = {}
    for method in ("lora", "qlora", "full"):
        start = start_of(nano_folder("qwen3_vl_moe"), CONFIGS[method])
        notes[method] = changes_of(start, CONFIGS[method], Answers.of(start, CONFIGS[method], None))
    said = (
        "the experts and routers of Qwen3-VL-MoE do not train, since adapters go beside linear layers only; "
        "method='full' trains all weights"
    )
    assert notes == {"lora": [said], "qlora": [said], "full": []}
