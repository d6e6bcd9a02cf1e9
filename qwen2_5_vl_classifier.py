"""The original API: two classes over the package, with no logic of their own.

    model = Qwen2_5_VLForBinaryClassification(model_name="Qwen/Qwen2-VL-2B-Instruct")
    model.freeze_base_model()
    trainer = Qwen2_5_VLTrainer(model, learning_rate=1e-4)
    loss = trainer.train_step(model.collate([{"image": image, "text": "A red bicycle.", "label": 1}]))
    model.predict(image, "A red bicycle.", return_probs=True)

Whatever its name says, the class loads any size of all families that the package knows, from Qwen2-VL to Qwen3.8 and
mixtures of experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.devices import DType, memory_advice
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.head import load_head_weights, mlp_head
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.files.bounded import check_tensor_file, open_regular_file
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.training.finetuning.step import (
    TrainableClassifier,
    check_batch,
    collate,
    train_step,
    trained_parameters,
)

__all__ = ["ClassifierOutput", "Qwen2_5_VLForBinaryClassification", "Qwen2_5_VLTrainer"]

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


@dataclass(frozen=True, slots=True)
class ClassifierOutput:
    """What the forward pass returns.

    Attributes:
        logits: float32, shape (rows, 2).
        loss: Cross-entropy, or `None` without labels.
    """

    logits: Tensor
    loss: Tensor | None = None


class Qwen2_5_VLForBinaryClassification(TrainableClassifier):
    """A Qwen vision-language model whose language head is replaced by a small classifier.

    Base model -> hidden states -> mean over all tokens under the attention mask -> Linear(hidden, 512) -> ReLU ->
    Dropout(0.1) -> Linear(512, 2).

    Args:
        model_name: Name on the Hugging Face hub, local folder, or "builtin:tiny".
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32" or "bfloat16"; the classifier itself is always float32.
        gradient_checkpointing: Trade time for memory while the base model trains.
        min_pixels: As in `Backbone.load`.
        max_pixels: As in `Backbone.load`.
        revision: Branch, tag or commit on the hub.

    Attributes:
        base_model: The transformers model without its language head.
        classifier: The classifier.

    Raises:
        CheckpointError: The checkpoint cannot be found, reached or used.
        OutOfMemoryError: It does not fit into memory.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        device: str = "auto",
        dtype: DType = "auto",
        gradient_checkpointing: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
    ) -> None:
        backbone = Backbone.load(
            Path(model_name) if isinstance(model_name, os.PathLike) else model_name,
            device=device,
            dtype=dtype,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            revision=revision,
        )
        head = mlp_head(backbone.hidden_size).to(backbone.device)
        super().__init__(backbone, Tap(LAST_NORM, "mean"), head)
        if gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        self.unfreeze_base_model()

    def freeze_base_model(self) -> None:
        """Let the classifier's parameters train and no others."""
        self.base_model.requires_grad_(False)
        self.base_model.zero_grad(set_to_none=True)
        self.classifier.requires_grad_(True)

    def unfreeze_base_model(self) -> None:
        """Let all parameters train."""
        self.requires_grad_(True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> ClassifierOutput:
        """Classify a batch of tensors, padded on either side.

        Args:
            input_ids: int64, shape (rows, tokens).
            attention_mask: Same shape, 1 for tokens and 0 for padding.
            pixel_values: Patches of all pictures, one after the other.
            image_grid_thw: Shape (pictures, 3): time, height and width of each picture in patches.
            labels: Shape (rows,), 0 or 1.
            mm_token_type_ids: Taken so that `model(**model.collate(...))` works; derived anew, never trusted.

        Raises:
            BatchError: The tensors do not fit together.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "labels": labels,
        }
        batch = {name: tensor for name, tensor in given.items() if tensor is not None}
        check_batch(batch, self.backbone, labels=labels is not None)
        logits = self.logits(batch)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.to(logits.device, torch.long))
        return ClassifierOutput(logits, loss)

    @overload
    def predict(self, image: ImageSource | None, text: str, return_probs: Literal[False] = False) -> int: ...

    @overload
    def predict(self, image: ImageSource | None, text: str, return_probs: Literal[True]) -> list[float]: ...

    @torch.inference_mode()
    def predict(self, image: ImageSource | None, text: str, return_probs: bool = False) -> int | list[float]:
        """Classify one picture with its text.

        Args:
            image: PIL image, path or bytes; `None` for text alone.
            text: The text.
            return_probs: Return probabilities instead of the class.

        Returns:
            0 or 1; or the probabilities of class 0 and of class 1, which add up to 1.

        Raises:
            ImageError: The picture cannot be opened.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with memory_advice("classifying one example"):
                logits = self.logits(self.backbone.processor([Example(image, text)]))
        finally:
            for module, training in modes:
                module.training = training
        probabilities: list[float] = logits.double().softmax(dim=-1)[0].tolist()
        return probabilities if return_probs else int(probabilities[1] >= probabilities[0])

    def collate(self, examples: Sequence[Example | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Turn examples with `image`, `text` and `label` into a batch for `Qwen2_5_VLTrainer.train_step`."""
        return collate(examples, self.backbone.processor)

    def save_classifier_weights(self, path: str | os.PathLike[str]) -> None:
        """Save the classifier's weights: as safetensors if the path ends so, else as a PyTorch file of tensors only.

        Raises:
            ArtifactError: The file cannot be written.
        """
        path = Path(path)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.classifier.state_dict().items()}
        try:
            if path.suffix == ".safetensors":
                save_file(weights, path)
            else:
                torch.save(weights, path)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(
                f"{path}: cannot be written ({type(error).__name__}); give a path in an existing folder, on a disk "
                "with room"
            ) from error

    def load_pretrained_weights(self, path: str | os.PathLike[str]) -> None:
        """Load the classifier's weights; on any error the model stays as it is.

        Raises:
            ArtifactError: The file cannot be read, or its keys or shapes are not those of this classifier.
        """
        path = Path(path)
        load_head_weights(self.classifier, _read_weights(path), source=str(path))


class Qwen2_5_VLTrainer:
    """Train a model step by step with AdamW.

    Args:
        model: What to train; freezing and unfreezing it between steps is noticed.
        learning_rate: 1e-3 to 1e-4 while the base model is frozen, 1e-5 to 1e-6 for the whole model.
        autocast: Run matrix products in bfloat16.
    """

    def __init__(
        self, model: Qwen2_5_VLForBinaryClassification, learning_rate: float = 1e-4, *, autocast: bool = False
    ) -> None:
        self.model = model
        self.learning_rate = learning_rate
        self.autocast = autocast
        self._trained: list[nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def train_step(self, batch: Mapping[str, Tensor]) -> float:
        """Run one step and return the loss before it.

        Args:
            batch: `input_ids`, `attention_mask`, `labels`, and `pixel_values` with `image_grid_thw` where there are
                pictures; `model.collate` makes one.

        Raises:
            BatchError: The batch does not fit together; nothing is changed.
            TrainingError: The loss or its gradient is not finite, or all weights are frozen; nothing is changed.
            OutOfMemoryError: The batch does not fit into memory.
        """
        return train_step(self.model, self._current_optimizer(), batch, autocast=self.autocast)

    def _current_optimizer(self) -> torch.optim.Optimizer:
        current = trained_parameters(self.model)
        if self._optimizer is None or not _same(current, self._trained):
            self._optimizer = torch.optim.AdamW(current, lr=self.learning_rate)
            self._trained = current
        return self._optimizer


def _same(first: Iterable[object], second: Iterable[object]) -> bool:
    return [id(item) for item in first] == [id(item) for item in second]


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            check_tensor_file(path)
            weights = load_file(path)
        else:
            open_regular_file(path).close()
            weights = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; give weights that save_classifier_weights wrote") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise ArtifactError(
            f"{path}: not a file of classifier weights ({type(error).__name__}); "
            "give one that save_classifier_weights wrote"
        ) from error
    if not isinstance(weights, dict):
        raise ArtifactError(
            f"{path}: holds a {type(weights).__name__}, not tensors by name; "
            "give weights that save_classifier_weights wrote"
        )
    return weights
