"""Several processes train as one does: the same global batch, the same course, to float tolerance.

Not covered: GPUs, NCCL, FSDP and DeepSpeed, which this machine does not have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, FinetuneConfig, Tap, finetune, load_examples
from qwen_vl_classifier.classifier.head import HeadSpec
from tests import nano
from tests.coloured_pictures import pictures

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]


def write_rows(folder: Path, count: int, seed: int) -> Path:
    lines = []
    for number, example in enumerate(pictures(count, seed)):
        example.image.resize((56, 56 + 28 * (number % 3))).save(folder / f"{seed}-{number}.png")
        text = example.text * (1 + number % 2)
        lines.append({"image": f"{seed}-{number}.png", "text": text, "label": example.label})
    path = folder / f"{seed}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_processes_train_as_one(tmp_path):
    backbone = Backbone.load(nano.make_checkpoint("qwen2_5_vl", tmp_path / "checkpoint"), device="cpu", dtype="float32")
    spec = HeadSpec("mlp", backbone.hidden_size, units=8, dropout=0.0)
    start = Classifier(backbone, Tap(3, "mean"), spec.build(), spec)
    start.save(tmp_path / "start")
    # 21 rows in steps of 8: the last one parts unevenly.
    training, validation = write_rows(tmp_path, 21, seed=1), write_rows(tmp_path, 13, seed=2)
    config = FinetuneConfig(
        learning_rate=1e-3, head_learning_rate=1e-2, epochs=2, batch_size=8, rank=2, adapter_dropout=0.0, patience=0
    )
    alone = finetune(start, load_examples(training), load_examples(validation), config=config, progress=False)
    flags = "--learning-rate 1e-3 --head-learning-rate 1e-2 --epochs 2 --batch-size 8 --rank 2 --adapter-dropout 0"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "qwen_vl_classifier", "finetune", str(training), "--validation", str(validation)]
    command += ["--from", str(tmp_path / "start"), "--out", str(tmp_path / "together"), "--device", "cpu"]
    command += [*flags.split(), "--patience", "0", "--report-to", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}  # torch leaves a folder there
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("saved ") == 1
    together = Classifier.load(tmp_path / "together", device="cpu")
    history = together.training["history"]
    for one, other in zip(history, alone.history, strict=True):
        assert one["validation_log_loss"] == pytest.approx(other["validation_log_loss"], rel=1e-4)
        assert (one["training_loss"] or 0) == pytest.approx(other["training_loss"] or 0, rel=1e-4)
    for name, tensor in alone.classifier.head.state_dict().items():
        assert torch.allclose(together.head.state_dict()[name], tensor, atol=1e-5), name
    examples = load_examples(validation)
    np.testing.assert_allclose(together.predict_proba(examples), alone.classifier.predict_proba(examples), atol=1e-4)
