"""Train a head on features that were read once: the frozen-base stage of the original API, in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.taps import LAST_NORM, Pooling, Tap
from qwen_vl_classifier.classifier.calibration import fit_temperature, probabilities
from qwen_vl_classifier.classifier.classifier import DEFAULT_THRESHOLD, Classifier
from qwen_vl_classifier.classifier.head import HeadSpec, fold_standardisation
from qwen_vl_classifier.config import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.splitting import holdout, labels_of

_ROUNDING = 1e-6  # deviations of float32 features that mean nothing, as a share of their size
_AUTO_POOLINGS: tuple[Pooling, ...] = ("mean", "last")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` found.

    Attributes:
        classifier: The best one.
        table: Every tap tried, best first: tap, validation log loss, accuracy and AUROC, epochs.
        validation_rows: Number of rows that chose among them.
    """

    classifier: Classifier
    table: list[dict[str, Any]]
    validation_rows: int

    def __str__(self) -> str:
        lines = [f"{'tap':<10} {'log loss':>9} {'accuracy':>9} {'AUROC':>7} {'epochs':>7}"]
        lines += [
            f"{row['tap']:<10} {row['log_loss']:>9.4f} {row['accuracy']:>9.4f} {row['auroc']:>7.4f} {row['epochs']:>7}"
            for row in self.table
        ]
        return "\n".join(lines)


def train(
    train_examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    backbone: Backbone,
    config: TrainConfig | None = None,
    store: FeatureStore | None = None,
    label_names: tuple[str, str] = ("0", "1"),
    progress: bool = True,
) -> TrainResult:
    """Train a head on frozen features and choose the tap on held-out rows.

    Features of all taps come from one pass; each head is trained with AdamW and stopped early; the tap with the
    least validation log loss is kept and its probabilities are calibrated with a temperature on the same rows.

    Args:
        train_examples: Labelled examples of both classes.
        validation: Labelled examples of both classes to choose on; `None` holds out a share of the training rows,
            whole in pictures and groups.
        backbone: What reads the features; it is not changed.
        config: Options.
        store: Where features are kept, if anywhere.
        label_names: What class 0 and class 1 are called.
        progress: Show progress bars on what takes more than two seconds.

    Raises:
        DataError: Missing labels, one class only, or too few examples.
        ConfigError: A tap that the backbone does not have.
        TrainingError: A head reached no finite loss.
    """
    config = config or TrainConfig()
    labels = labels_of(train_examples, what="training")
    taps = candidate_taps(config.taps, backbone)
    if validation is None:
        train_rows, validation_rows = holdout(train_examples, config.validation_share, config.seed)
        features = extract_features(train_examples, backbone, taps, store=store, progress=progress)
        data = (features[train_rows], labels[train_rows], features[validation_rows], labels[validation_rows])
    else:
        validation_labels = labels_of(validation, what="validation")
        features, validation_features = (
            extract_features(rows, backbone, taps, store=store, progress=progress)
            for rows in (train_examples, validation)
        )
        data = (features, labels, validation_features, validation_labels)
    x, y, x_validation, y_validation = data
    spec = HeadSpec("mlp", backbone.hidden_size, config.units, config.dropout)
    tried = []
    for number, tap in enumerate(tqdm(taps, desc="heads", unit="tap", delay=2, disable=not progress)):
        head, epochs = _fit(x[:, number], y, x_validation[:, number], y_validation, spec, config)
        with torch.inference_mode():
            logits = head(torch.from_numpy(np.ascontiguousarray(x_validation[:, number]))).numpy()
        if not (epochs and np.isfinite(logits).all()):
            raise TrainingError(
                f"the head at tap {tap} gives NaN or infinity; lower learning_rate, or look for broken features"
            )
        temperature = fit_temperature(logits, y_validation)
        row = {"tap": str(tap), **_scores(y_validation, probabilities(logits, temperature)), "epochs": epochs}
        tried.append((row, tap, head, temperature))
    # Ties go to the earlier layer, which is cheaper.
    tried.sort(key=lambda entry: (entry[0]["log_loss"], _depth(entry[1], backbone)))
    best, tap, head, temperature = tried[0]
    table = [row for row, *_ in tried]
    record = {
        "method": "probe",
        "training_rows": len(y),
        "validation_rows": len(y_validation),
        **{f"validation_{name}": best[name] for name in ("log_loss", "accuracy", "auroc")},
        "options": asdict(config),
        "table": table,
    }
    classifier = Classifier(
        backbone, tap, head, spec, temperature=temperature, label_names=label_names, training=record
    )
    return TrainResult(classifier, table, len(y_validation))


def candidate_taps(text: str, backbone: Backbone) -> list[Tap]:
    """Return the taps that an option names.

    Args:
        text: A list such as "mean:-1,last:24", or "auto": mean and last token at half of the depth, at three
            quarters and after the final norm.
        backbone: Says how deep it is.

    Raises:
        ConfigError: A tap is malformed, or the backbone does not have it.
    """
    if text == "auto":
        layers = {max(1, round(backbone.num_layers * share)) for share in (0.5, 0.75)}
        taps = [Tap(layer, pooling) for layer in (*sorted(layers), LAST_NORM) for pooling in _AUTO_POOLINGS]
    else:
        taps = list(dict.fromkeys(Tap.parse(part.strip()) for part in text.split(",")))
    return list(backbone.check_taps(taps))


def _scores(labels: npt.NDArray[np.int64], probability: npt.NDArray[np.float64]) -> dict[str, float]:
    return {
        "log_loss": float(log_loss(labels, probability, labels=[0, 1])),
        "accuracy": float(accuracy_score(labels, probability[:, 1] >= DEFAULT_THRESHOLD)),
        "auroc": float(roc_auc_score(labels, probability[:, 1])),
    }


def _depth(tap: Tap, backbone: Backbone) -> int:
    return backbone.total_layers + 1 if tap.layer == LAST_NORM else tap.layer


def _fit(
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    x_validation: npt.NDArray[np.float32],
    y_validation: npt.NDArray[np.int64],
    spec: HeadSpec,
    config: TrainConfig,
) -> tuple[nn.Module, int]:
    """Train one head; return it with the best validation log loss, and the epoch that reached it, 0 for none."""
    mean, scale = _standardisation(x)
    inputs, targets = (torch.from_numpy(x) - mean) / scale, torch.from_numpy(y)
    validation_inputs = (torch.from_numpy(x_validation) - mean) / scale
    validation_targets = torch.from_numpy(y_validation)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our business
        torch.manual_seed(config.seed)
        head = spec.build()
        optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        best_loss, best_epoch, best_state = math.inf, 0, _copy(head)
        for epoch in range(1, config.epochs + 1):
            head.train()
            for rows in torch.randperm(len(inputs)).split(config.batch_size):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(head(inputs[rows]), targets[rows]).backward()
                optimizer.step()
            head.eval()
            with torch.inference_mode():
                loss = float(nn.functional.cross_entropy(head(validation_inputs), validation_targets))
            if loss < best_loss:
                best_loss, best_epoch, best_state = loss, epoch, _copy(head)
            elif epoch - best_epoch >= config.patience:
                break
    head.load_state_dict(best_state)
    fold_standardisation(head, mean, scale)
    return head.eval(), best_epoch


def _standardisation(x: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Return mean and scale of each feature, shape (hidden,); infinite scale where it is constant but for rounding.

    A constant feature carries nothing. Divided by infinity it stays zero, also where it varies later on; divided by
    its own tiny deviation, it would then drown all others.
    """
    mean, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    deviation[deviation <= _ROUNDING * np.maximum(np.abs(mean), 1.0)] = np.inf
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()


def _copy(head: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}
