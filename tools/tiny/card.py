"""The model card of the built-in backbone: data, compute, time and scores."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from qwen_vl_classifier.backbone.backbone import Backbone
from tools.tiny.lesson_batches import Recipe


def write_card(
    folder: Path, backbone: Backbone, recipe: Recipe, *, start: str, steps: int, lessons: int, seconds: float
) -> None:
    """Say in README.md of a checkpoint what it is and how it was made.

    Args:
        folder: The checkpoint, with its training log.
        backbone: What was trained.
        recipe: How.
        start: What training began from, in words.
        steps: Number of optimiser steps.
        lessons: Number of examples shown, those of the looking stage included.
        seconds: Training time.
    """
    weights = sum(parameter.numel() for parameter in backbone.model.parameters())
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [
        f"| {name} | {value['loss']:.3f} | {value['accuracy']:.3f} |"
        for name, value in (json.loads(lines[-1]) if lines else {}).items()
        if isinstance(value, dict)
    ]
    settings = ", ".join(f"{name} {value}" for name, value in asdict(recipe).items())
    machine = f"{os.cpu_count()} CPU cores" if backbone.device.type == "cpu" else torch.cuda.get_device_name()
    (folder / "README.md").write_text(
        f"""# The built-in backbone of qwen-vl-classifier

A Qwen2.5-VL architecture in miniature ({weights / 1e6:.1f} million weights, bfloat16), trained from {start} on
synthetic scenes of coloured shapes and on nothing else. It is for trying things out, for tests and for benchmarks.

- Data: {lessons:,} examples of the split "pretraining": single scenes, some of them larger, two or three scenes in one
  example, and pictures of three boxes with items or towers; each with captions and up to {recipe.questions} questions.
  Colour-shape pairs in `UNSEEN_PAIRS` are neither drawn nor named.
- Compute: {steps:,} steps in {seconds / 60:.0f} minutes on {machine}.
- Recipe: {settings}.
- Made by: `python -m tools.tiny.pretrain`.

Over the last steps of training, on examples seen for the first time:

| kind | loss | accuracy |
|---|---|---|
{chr(10).join(scores)}
""",
        encoding="utf-8",
    )
