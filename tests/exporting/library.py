"""What libraries make of an exported folder, recomputed from its files, for tests: without torchvision and without
sentence-transformers, which the tests do not have. `scripts/check_library.py` runs the real ones.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from qwen_vl_classifier import Example
from qwen_vl_classifier.exporting.export_manifest import read_export


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def processor_of(folder: Path, **_: Any) -> Any:
    """Return transformers' own processor for a folder, without its half for videos, which needs torchvision."""
    kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES[read(folder / "config.json")["model_type"]])

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Let the missing half pass."""

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return WithoutVideos(pictures, tokenizer, None, chat_template=tokenizer.chat_template)


class CrossEncoderByFiles:
    """Answer as sentence-transformers' `CrossEncoder` does, from what the files of a folder say."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        assert read(self.folder / "config_sentence_transformers.json")["model_type"] == "CrossEncoder"
        modules = read(self.folder / "modules.json")
        assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Dense"]
        assert modules[0]["path"] == ""
        self.reading = read(self.folder / "sentence_bert_config.json")
        self.pooling, self.dense = (read(self.folder / module["path"] / "config.json") for module in modules[1:])
        self.weights = load_file(self.folder / modules[2]["path"] / "model.safetensors")
        self.processor = processor_of(self.folder)
        self.model, report = AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]

    @torch.inference_mode()
    def predict(self, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> np.ndarray:
        """Return the scores of pairs, shape (pairs, outputs)."""
        options = self.reading["processing_kwargs"]["chat_template"]
        messages = [
            [{"role": role, "content": parts_of(part)} for role, part in zip(("query", "document"), pair, strict=True)]
            for pair in pairs
        ]
        prompts = [self.processor.apply_chat_template(message, tokenize=False, **options) for message in messages]
        images = [image for query, _ in pairs for image in query.get("image", ())]
        inputs = self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        states = self.model(**inputs)[self.reading["modality_config"]["message"]["method_output_name"]]
        mask = inputs["attention_mask"]
        pooled = {
            "mean": lambda: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
            "lasttoken": lambda: states[torch.arange(len(pairs)), (mask * torch.arange(mask.shape[1])).argmax(1)],
        }[self.pooling["pooling_mode"]]()
        module, _, name = self.dense["activation_function"].rpartition(".")
        scores = torch.nn.functional.linear(pooled.float(), self.weights["linear.weight"], self.weights["linear.bias"])
        return getattr(importlib.import_module(module), name)()(scores).numpy()


def parts_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message, each with its kind."""
    many = {kind: list(part) if isinstance(part, (list, tuple)) else [part] for kind, part in value.items()}
    return [{"type": kind, kind: part} for kind, parts in many.items() for part in parts]


def client_of(folder: Path, monkeypatch: Any) -> SimpleNamespace:
    """Run the client.py of an exported folder, with libraries as far as they are here."""
    monkeypatch.setattr(transformers, "AutoProcessor", SimpleNamespace(from_pretrained=processor_of))
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(CrossEncoder=CrossEncoderByFiles))
    monkeypatch.delitem(sys.modules, "decide", raising=False)
    monkeypatch.syspath_prepend(folder)
    return SimpleNamespace(**runpy.run_path(str(folder / "client.py")))


def reference(folder: Path) -> tuple[list[tuple[list[Image.Image], str]], list[Example], np.ndarray]:
    """Return the reference examples of a folder: as rows for its client, as examples, and their probabilities."""
    rows = read_export(folder).examples
    return (
        [([Image.open(folder / name).convert("RGB") for name in row.images], row.text) for row in rows],
        [Example([folder / name for name in row.images] or None, row.text) for row in rows],
        np.array([row.probability for row in rows]),
    )
