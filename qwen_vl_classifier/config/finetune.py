"""Options of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vl_classifier.config.fields import (
    MAX_ERRORS_HELP,
    check_choices,
    check_not_negative,
    check_positive,
    check_share,
    class_weight_of,
    group_by_option,
    most_errors,
    option,
    without_effect,
)
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import MAX_ERROR_HELP
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.objectives import Objective

METHODS = ("lora", "qlora", "full")
"""What trains in fine-tuning: adapters, adapters on 4-bit weights, or the weights themselves."""

TOWERS = ("llm", "llm+vision", "all")
"""Where: the decoder; the blocks of the vision tower too; patch embedding, mergers and token embeddings too."""

SCHEDULES = ("cosine", "linear", "constant")

AUGMENTATIONS = ("none", "light", "strong")
"""How training sees pictures: as they are; taken again from nearly the same place; by another hand and camera."""

_ADAPTER_RATE, _FULL_RATE = 2e-4, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """How the whole model is trained, starting from a classifier.

    Raises:
        ConfigError: A value is out of its range.
    """

    method: str = option("lora", "what trains: adapters, adapters on 4-bit weights, or the weights", choices=METHODS)
    towers: str = option("llm", "where it trains: decoder, vision tower too, or all weights", choices=TOWERS)
    learning_rate: float = option(0.0, "learning rate of the backbone; 0 takes 2e-4 for adapters, 1e-5 for weights")
    head_learning_rate: float = option(1e-4, "learning rate of the head")
    schedule: str = option("cosine", "how learning rates fall after warm-up", choices=SCHEDULES)
    warmup: float = option(0.1, "share of the steps in which learning rates rise")
    weight_decay: float = option(0.01, "weight decay")
    batch_size: int = option(16, "examples in one step, over all processes")
    micro_batch_size: int = option(0, "examples in one pass; 0 takes all that fit, and halves where memory runs out")
    epochs: int = option(3, "passes over the training data")
    evaluations_per_epoch: int = option(1, "how often validation rows are looked at")
    patience: int = option(2, "stop after so many evaluations without a better validation log loss; 0 never stops")
    rank: int = option(16, "rank of the adapters")
    alpha: float = option(32.0, "scale of the adapters, divided by the rank")
    adapter_dropout: float = option(0.05, "dropout of the adapters, from 0 to below 1")
    merge: bool = option(False, "add the adapters to the weights at the end: faster to use, larger to keep")
    augment: str = option(
        "none",
        "how much pictures are changed at random while training; look at the page in the run's folder",
        choices=AUGMENTATIONS,
    )
    flips: bool = option(False, "mirror half of the pictures too: only where left and right mean nothing")
    class_weight: str | Mapping[int, float] | None = option(
        None, "weights of the classes: none, balanced, or 0:W,1:W such as 0:1,1:5"
    )
    weight_column: str = option("", "column that holds the weight of each row; empty weighs all alike")
    focal_gamma: float = option(0.0, "focusing of the focal loss; 0 is cross-entropy")
    objective: str | None = option(
        None,
        "what the threshold is chosen for: accuracy, f1, balanced, recall>=R, precision>=P or cost=FN:FP "
        "(default: what the start's was chosen for, or accuracy)",
        kind=str,
    )
    max_error: float | None = option(None, f"{MAX_ERROR_HELP} (default: that of the start, or 0)", kind=float)
    gradient_checkpointing: bool = option(False, "trade time for memory")
    bf16: bool = option(False, "run matrix products in bfloat16")
    group_by: str = group_by_option("what rows held out do not share with the others")
    validation_share: float = option(
        0.2, "share of rows held out where no validation data is given, and again where there is a target error rate"
    )
    save_steps: int = option(100, "steps between checkpoints, from which a run that was killed goes on")
    report_to: str = option("auto", "what shows the course: auto (TensorBoard, if installed), none, wandb or others")
    max_errors: str = option("", MAX_ERRORS_HELP)
    seed: int = option(0, "seed of split, order, dropout and augmentation")

    def __post_init__(self) -> None:
        most_errors(self.max_errors, 0)
        check_choices(self)
        check_positive(
            self, "head_learning_rate", "batch_size", "epochs", "evaluations_per_epoch", "rank", "alpha", "save_steps"
        )
        check_share(self, "validation_share")
        check_share(self, "warmup", "adapter_dropout", *(["max_error"] if self.max_error else []), allow_zero=True)
        check_not_negative(self, "learning_rate", "micro_batch_size", "patience", "weight_decay", "focal_gamma", "seed")
        if self.objective is not None:
            Objective.parse(self.objective)
        object.__setattr__(self, "class_weight", class_weight_of(self.class_weight))
        if self.merge and self.method != "lora":
            raise ConfigError(f"merge with method {self.method}: only adapters on whole weights merge; use method lora")

    @property
    def rate(self) -> float:
        """The learning rate of the backbone."""
        return self.learning_rate or (_FULL_RATE if self.method == "full" else _ADAPTER_RATE)

    def unused(self) -> list[str]:
        """Return a sentence for each option that was given and has no effect beside the others."""
        found = []
        if self.method == "full":
            found += without_effect(self, f"with {spelled('method', 'full')}", "rank", "alpha", "adapter_dropout")
        if self.augment == "none":
            found += without_effect(self, f"with {spelled('augment', 'none')}", "flips")
        return found
