"""Stage 2 of the original recipe: train the whole model, from where the probe ended."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import log_loss
from torch import Tensor
from tqdm import tqdm

from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.classifier.calibration import fit_temperature, probabilities
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config import FinetuneConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.training.splitting import holdout, labels_of
from qwen_vl_classifier.training.step import TrainableClassifier, collate, train_step


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What `finetune` reached.

    Attributes:
        classifier: The best state on the validation rows; where no epoch was better than the start, the start.
        history: For each epoch, from 0 for the start: mean training loss (`None` for the start) and validation log
            loss, each with the temperature that suits it best.
        improved: Whether any epoch was better than the start.
    """

    classifier: Classifier
    history: list[dict[str, Any]]
    improved: bool


def finetune(
    start: Classifier,
    train_examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    config: FinetuneConfig | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Train backbone and head together with AdamW, in float32 weights.

    The epoch with the least validation log loss is kept, and its probabilities are calibrated on the same rows.

    Args:
        start: Where to start; it is not changed.
        train_examples: Labelled examples of both classes.
        validation: Labelled examples of both classes that choose the best epoch; `None` holds out a share of the
            training rows, whole in pictures and groups.
        config: Options.
        progress: Show a progress bar.

    Raises:
        DataError: Missing labels, one class only, or too few examples.
        TrainingError: Loss, gradient or validation logits are not finite.
        OutOfMemoryError: A batch does not fit.
    """
    config = config or FinetuneConfig()
    labels_of(train_examples, what="training")
    if validation is None:
        train_rows, validation_rows = holdout(train_examples, config.validation_share, config.seed)
        validation = [train_examples[row] for row in validation_rows]
        train_examples = [train_examples[row] for row in train_rows]
    validation_labels = labels_of(validation, what="validation")
    classifier = _trainable_copy(start)
    backbone = classifier.backbone
    model = TrainableClassifier(backbone, classifier.tap, classifier.head)
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.base_model.parameters()), "lr": config.learning_rate},
            {"params": list(model.classifier.parameters()), "lr": config.head_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    model.base_model.requires_grad_(True)
    best_loss, temperature = _validate(classifier, validation, validation_labels)
    history: list[dict[str, Any]] = [{"epoch": 0, "training_loss": None, "validation_log_loss": best_loss}]
    best_state: dict[str, Tensor] | None = None
    order = np.random.default_rng(config.seed)
    steps = math.ceil(len(train_examples) / config.batch_size)
    with (
        torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []),
        tqdm(total=config.epochs * steps, desc="fine-tune", unit="step", disable=not progress) as bar,
    ):
        torch.manual_seed(config.seed)
        for epoch in range(1, config.epochs + 1):
            losses = []
            for rows in np.array_split(order.permutation(len(train_examples)), steps):
                batch = collate([train_examples[row] for row in rows], backbone.processor)
                losses.append(train_step(model, optimizer, batch, autocast=config.autocast))
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4f}", validation=f"{best_loss:.4f}")
            model.eval()
            loss, fitted = _validate(classifier, validation, validation_labels)
            history.append({"epoch": epoch, "training_loss": float(np.mean(losses)), "validation_log_loss": loss})
            if loss < best_loss:
                best_loss, temperature = loss, fitted
                best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if best_state is None:
        return FinetuneResult(start, history, improved=False)
    model.load_state_dict(best_state)
    model.requires_grad_(False).eval()
    backbone.mark_changed()
    classifier.temperature = temperature
    classifier.finetuned = True
    classifier.training = {
        "method": "finetune",
        "training_rows": len(train_examples),
        "validation_rows": len(validation),
        "validation_log_loss": best_loss,
        "options": asdict(config),
        "history": history,
        "start": start.training,
    }
    return FinetuneResult(classifier, history, improved=True)


def _trainable_copy(start: Classifier) -> Classifier:
    """Load the backbone again, in float32: steps as small as these vanish in bfloat16 weights."""
    source = start.backbone
    smallest, largest = source.pixel_limits
    backbone = Backbone.load(
        source.folder,
        device=str(source.device),
        dtype="float32",
        num_layers=None if start.tap.layer == LAST_NORM else start.tap.layer,
        min_pixels=smallest,
        max_pixels=largest,
    )
    backbone.name, backbone.revision = source.name, source.revision
    if source.changed:  # trained before and not saved: the files know nothing of it
        weights = source.model.state_dict()
        backbone.model.load_state_dict({name: weights[name] for name in backbone.model.state_dict()})
        backbone.mark_changed()
    return Classifier(
        backbone,
        start.tap,
        copy.deepcopy(start.head).requires_grad_(True).to(backbone.device),
        start.spec,
        temperature=start.temperature,
        threshold=start.threshold,
        abstention=start.abstention,
        label_names=start.label_names,
    )


def _validate(
    classifier: Classifier, examples: Sequence[Example], labels: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Return the log loss at the temperature that suits it best, and that temperature."""
    features = classifier.backbone.encode(examples, [classifier.tap])
    logits = classifier.logits_of(features[:, 0])
    if not np.isfinite(logits).all():
        raise TrainingError("the model gives NaN or infinity on the validation rows; lower the learning rate")
    temperature = fit_temperature(logits, labels)
    return float(log_loss(labels, probabilities(logits, temperature), labels=[0, 1])), temperature
