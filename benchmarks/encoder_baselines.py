"""What the encoder is measured against: the loop that most scripts write, and sentence-transformers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from qwen_vl_classifier import Example
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.images.opening import open_image


class PlainLoop:
    """Batches in the given order through transformers' class, all hidden states kept, the last one mean-pooled.

    The model is in evaluation mode, without gradients, with the attention and the cache that it takes by default. Its
    forward computes the logits of every token, as that class does unless told otherwise. Pictures become patches by
    transformers' own image processor, in the thread that runs the model.

    Args:
        folder: The checkpoint.
        processor: Has transformers' tokeniser and image processor, and the chat template; nothing else of it is used.
        dtype: Of the weights.
        device: Where to run.
        batch_size: Examples padded to one length and run together.
    """

    def __init__(
        self, folder: Path, processor: Processor, *, dtype: torch.dtype, device: torch.device, batch_size: int
    ) -> None:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.processor = processor
        self.batch_size = batch_size

    def encode(self, examples: Sequence[Example], *, batch_size: int | None = None) -> npt.NDArray[np.float32]:
        """Return features of shape (examples, hidden), by batches of another size if given."""
        batches = self._batches(examples, batch_size or self.batch_size)
        return np.concatenate([self._features(batch).cpu().numpy() for batch in batches])

    def train_epoch(self, examples: Sequence[Example], head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Train a head for one epoch with the backbone frozen: a pass of the backbone for every batch."""
        for batch in self._batches(examples, self.batch_size):
            features = self._features(batch)
            labels = torch.tensor([example.label for example in batch], device=features.device)
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(head(features), labels).backward()
            optimizer.step()

    @staticmethod
    def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def inputs(self, batch: Sequence[Example]) -> dict[str, Tensor]:
        """Decode, render and tokenise as transformers' processor of these models does, padded on the right."""
        processor = self.processor
        pictures = [Image.open(_readable(source)).convert("RGB") for example in batch for source in example.images]
        patches = dict(processor.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
        counts = iter((patches["image_grid_thw"].prod(1) // processor.merge_size**2).tolist() if pictures else ())
        mark = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
        texts = []
        for example in batch:
            content = [{"type": "image"} for _ in example.images] + [{"type": "text", "text": example.text}]
            first, *parts = processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=processor.chat_template,
                add_generation_prompt=True,
                tokenize=False,
            ).split(mark)
            texts.append(first + "".join(mark * next(counts) + part for part in parts))
        tokens = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        types = (ids == processor.image_token_id).long()
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **patches}

    @torch.no_grad()
    def _features(self, batch: Sequence[Example]) -> Tensor:
        inputs = {name: tensor.to(self.model.device) for name, tensor in self.inputs(batch).items()}
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return ((hidden * mask).sum(1) / mask.sum(1)).float()


def _readable(source: Any) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


class SentenceTransformers:
    """The same features by sentence-transformers' own pipeline, with its own batches and order.

    Args:
        folder: The checkpoint.
        dtype: Of the weights.
        device: Where to run.
        batch_size: Its `batch_size`.

    Raises:
        ImportError: sentence-transformers, or something that its processor needs, is not installed.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer: Any = Transformer(
            str(folder),
            model_kwargs={"dtype": dtype},
            # Its default leaves the generation prompt out; with it, both sides read the same tokens.
            processing_kwargs={"chat_template": {"add_generation_prompt": True}},
        )
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        self.model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
        self.batch_size = batch_size

    def encode(self, examples: Sequence[Example]) -> npt.NDArray[np.float32]:
        """Return features of shape (examples, hidden)."""
        rows = [{"image": open_image(example.images[0]), "text": example.text} for example in examples]
        features: npt.NDArray[np.float32] = self.model.encode(
            rows, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        return features
