"""An engine that answers from an exported folder alone: plain transformers, one matrix product, a softmax.

It reads what vLLM reads, and in the same way: the chat template without a generation prompt, special tokens in texts as
tokens, pictures by the settings in the folder.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

PIXELS = "pixel_values"


class EngineByFiles:
    """Answer as a pooling model of vLLM does.

    Args:
        folder: The exported folder.
        pooling: "MEAN" or "LAST", as `--pooler-config` says.
    """

    def __init__(self, folder: Path, pooling: str) -> None:
        self.pooling = pooling
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pictures = AutoImageProcessor.from_pretrained(folder)
        self.model, report = AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
        self.model.eval()
        assert not report["missing_keys"]
        weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        self.prefix = next(name for name in weights if name.endswith("score.weight")).removesuffix("weight")
        assert set(report["unexpected_keys"]) == {f"{self.prefix}weight", f"{self.prefix}bias"}
        self.weight, self.bias = (weights[f"{self.prefix}{part}"].double() for part in ("weight", "bias"))

    def inputs(self, content: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what the model reads of a message's parts, as an OpenAI client sends them."""
        images = [opened(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
        parts = [part if part["type"] == "text" else {"type": "image"} for part in content]
        prompt = self.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        made: dict[str, torch.Tensor] = {}
        if images:
            made = dict(self.pictures(images=images, return_tensors="pt"))
            side = self.config["vision_config"]["spatial_merge_size"]
            for grid in made["image_grid_thw"]:
                prompt = prompt.replace("<|image_pad|>", "<|picture|>" * (int(grid.prod()) // side**2), 1)
            prompt = prompt.replace("<|picture|>", "<|image_pad|>")
        ids = torch.tensor([self.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        types = (ids == self.config["image_token_id"]).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **made}

    @torch.inference_mode()
    def answer(self, content: Sequence[dict[str, Any]]) -> tuple[list[float], int]:
        """Return the probabilities of both classes, and the number of tokens."""
        inputs = self.inputs(content)
        states = self.model(**inputs).last_hidden_state[0].double()
        pooled = states.mean(0) if self.pooling == "MEAN" else states[-1]
        return torch.softmax(self.weight @ pooled + self.bias, -1).tolist(), len(states)

    def answers(self, rows: Sequence[Any], folder: Path) -> np.ndarray:
        """Return the probability of class 1 of reference examples."""
        return np.array([self.answer(content_of(row.text, row.images, folder))[0][1] for row in rows])


def content_of(text: str, images: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the parts of a message."""
    urls = [f"data:image/png;base64,{base64.b64encode((folder / image).read_bytes()).decode()}" for image in images]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def opened(url: str) -> Image.Image:
    """Return the picture in a data URL."""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
