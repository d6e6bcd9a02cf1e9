"""Record what a run depends on, and open its folder from all of its processes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.training.finetuning.final_classifier import Answers
from qwen_vl_classifier.training.finetuning.resuming import digest_of, open_run
from qwen_vl_classifier.training.finetuning.training_batches import LabelledRows

_NOT_OF_THE_RESULT = (
    "micro_batch_size",
    "save_steps",
    "report_to",
    "keep_vision_tokens",
)  # options that change how a run goes, not where


def world_size() -> int:
    """Return the number of processes, as launchers say it before any of them has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def open_together(
    folder: Path,
    start: Classifier | Backbone,
    rows: LabelledRows,
    validation: LabelledRows,
    config: FinetuneConfig,
    answers: Answers,
    out: str | os.PathLike[str] | None,
    *,
    resume: bool,
) -> tuple[bool, Path | None]:
    """Let the first of all processes open the run; return whether this is it, and the checkpoint to continue from."""
    record = _record(start, rows, validation, config, answers, out)
    if world_size() == 1:
        return True, open_run(folder, record, resume=resume)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    backbone = start if isinstance(start, Backbone) else start.backbone
    processes = PartialState(cpu=backbone.device.type == "cpu")
    checkpoint = open_run(folder, record, resume=resume) if processes.is_main_process else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    return processes.is_main_process, checkpoint


def _record(
    start: Classifier | Backbone,
    rows: LabelledRows,
    validation: LabelledRows,
    config: FinetuneConfig,
    answers: Answers,
    out: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Return all that decides what a run computes, as JSON has it: keys are texts."""
    backbone = start if isinstance(start, Backbone) else start.backbone
    begin: dict[str, Any] = {"backbone": backbone.fingerprint}
    if isinstance(start, Classifier):
        begin |= {"tap": str(start.tap), "head": {name: t.sum().item() for name, t in start.head.state_dict().items()}}
    record: dict[str, Any] = {
        "config": {name: value for name, value in asdict(config).items() if name not in _NOT_OF_THE_RESULT},
        "start": begin,
        "answers": {"objective": answers.objective, "target_error_rate": answers.target_error_rate},
        "out": None if out is None else str(Path(out).resolve()),
        "training rows": digest_of(rows.examples),
        "validation rows": digest_of(validation.examples),
    }
    as_read: dict[str, Any] = json.loads(json.dumps(record))
    return as_read
