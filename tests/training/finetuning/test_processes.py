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


# What `python -m torch.distributed.run --standalone --nproc-per-node 2` does, without the seconds that interpreters
# take to import torch: a store in the parent, and the variables by which its children find it and each other.
LAUNCHER = """
import os, sys
from datetime import timedelta
from torch.distributed import TCPStore
from qwen_vl_classifier.cli.main import main
from tests.fresh import in_child

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}

def be(rank):
    os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.exit(main(sys.argv[1:]))

# The first has a parent of its own, to wait for.
child = os.fork()
if child == 0:
    os._exit(in_child(lambda: be(0)) % 256)
status = in_child(lambda: be(1))
sys.exit(status or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def launched(fresh, folder: Path, command: list[str]) -> tuple[int, str, str]:
    """Run the command line in two processes; return status, standard output and standard error."""
    done = fresh.run(LAUNCHER, *command)
    return done.returncode, done.stdout, done.stderr


def launched_by_torch(_, folder: Path, command: list[str]) -> tuple[int, str, str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}  # torch leaves a folder there
    launch += ["-m", "qwen_vl_classifier", *command]
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("launch", [launched, pytest.param(launched_by_torch, marks=pytest.mark.soak)])
def test_two_processes_train_as_one(launch, tmp_path, fresh):
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
    command = ["finetune", str(training), "--validation", str(validation), "--patience", "0", "--report-to", "none"]
    command += ["--from", str(tmp_path / "start"), "--out", str(tmp_path / "together"), "--device", "cpu"]
    flags = "--learning-rate 1e-3 --head-learning-rate 1e-2 --epochs 2 --batch-size 8 --rank 2 --adapter-dropout 0"
    status, printed, errors = launch(fresh, tmp_path, command + flags.split())
    assert status == 0, errors[-2000:]
    assert printed.count("Saved: ") == 1
    together = Classifier.load(tmp_path / "together", device="cpu")
    history = together.training["history"]
    for one, other in zip(history, alone.history, strict=True):
        assert one["validation_log_loss"] == pytest.approx(other["validation_log_loss"], rel=1e-4)
        assert (one["training_loss"] or 0) == pytest.approx(other["training_loss"] or 0, rel=1e-4)
    for name, tensor in alone.classifier.head.state_dict().items():
        assert torch.allclose(together.head.state_dict()[name], tensor, atol=1e-5), name
    examples = load_examples(validation)
    np.testing.assert_allclose(together.predict_proba(examples), alone.classifier.predict_proba(examples), atol=1e-4)
