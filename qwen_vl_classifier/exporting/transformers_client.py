"""Classify with transformers and this folder: `python client.py TEXT [PICTURE ...]`.

It needs torch, torchvision, transformers from 5.17 and Pillow, and `decide.py` and `decision.json` beside it.
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForSequenceClassification, AutoProcessor

from qwen_vl_classifier.exporting.decide import check_text, decide

FOLDER = Path(__file__).resolve().parent


@cache
def loaded() -> tuple[Any, Any, dict[str, Any]]:
    """Return model, processor and the content of `decision.json`."""
    processor = AutoProcessor.from_pretrained(FOLDER)
    processor.image_processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")  # as in training
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER).eval()
    return model, processor, json.loads((FOLDER / "decision.json").read_text(encoding="utf-8"))


@torch.inference_mode()
def probabilities(rows: Sequence[tuple[Sequence[Image.Image], str]]) -> list[float]:
    """Return the model's probability of class 1 for rows of pictures and a text; `decide` takes it from there."""
    model, processor, rules = loaded()
    prompts = []
    for pictures, text in rows:
        check_text(text, rules, pictures=bool(pictures))
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    images = [ImageOps.exif_transpose(picture).convert("RGB") for pictures, _ in rows for picture in pictures]
    inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
    logits = model(**inputs.to(model.device)).logits.double()
    logits[:, 1] += rules["margin_offset"]  # the bias, which transformers' head does not have
    found: list[float] = logits.softmax(dim=1)[:, 1].tolist()
    return found


if __name__ == "__main__":
    (probability,) = probabilities([([Image.open(path) for path in sys.argv[2:]], sys.argv[1])])
    sys.stdout.write(json.dumps(decide(probability, loaded()[2]), ensure_ascii=False) + "\n")
