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
from qwen_vl_classifier.config.train import (
    CLASS_WEIGHT_HELP,
    OBJECTIVE_HELP,
    TARGET_ERROR_RATE_HELP,
    WEIGHT_COLUMN_HELP,
)
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.objectives import Objective

METHODS = ("lora", "qlora", "full")
"""What fine-tuning trains: adapters, adapters on 4-bit weights, or all weights."""

TOWERS = ("llm", "llm+vision", "all")
"""Which parts it trains: the decoder; also the blocks of the vision tower; also patch embedding, mergers and tokens."""

OPTIMIZERS = ("adamw", "paged-adamw-8bit")
"""AdamW with averages in float32; or in 8 bits, in memory that moves to the host where a CUDA GPU has no room."""

SCHEDULES = ("cosine", "linear", "constant")

AUGMENTATIONS = ("none", "light", "strong")
"""How strongly pictures are augmented: not at all; as if taken again; as if taken by another person and camera."""

_ADAPTER_RATE, _FULL_RATE = 2e-4, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """Options of training the whole model, starting from a classifier.

    Raises:
        ConfigError: A value is out of its range.
    """

    method: str = option(
        "lora", "what to train: LoRA adapters, LoRA adapters on 4-bit weights, or all weights", choices=METHODS
    )
    towers: str = option(
        "llm",
        "parts to train: the language model, the vision tower too, or everything",
        choices=TOWERS,
        rare=True,
    )
    learning_rate: float = option(
        0.0,
        "learning rate of the backbone; 0 means 2e-4 for adapters and 1e-5 for all weights",
        metavar="NUMBER",
        rare=True,
    )
    head_learning_rate: float = option(
        1e-4, "learning rate of the head", metavar="NUMBER", section="how it learns", rare=True
    )
    optimizer: str = option(
        "adamw",
        "optimizer: AdamW, or paged AdamW in 8 bits, which needs less memory on a CUDA GPU (bitsandbytes)",
        choices=OPTIMIZERS,
        section="how it learns",
        rare=True,
    )
    schedule: str = option(
        "cosine", "how learning rates fall after the warm-up", choices=SCHEDULES, section="how it learns", rare=True
    )
    warmup: float = option(
        0.1,
        "fraction of the steps during which learning rates rise",
        metavar="FRACTION",
        section="how it learns",
        rare=True,
    )
    weight_decay: float = option(0.01, "weight decay", metavar="NUMBER", section="how it learns", rare=True)
    batch_size: int = option(16, "rows in one training step, over all processes", metavar="ROWS")
    micro_batch_size: int = option(
        0,
        "examples in one forward pass; 0 takes as many as fit, and halves them when memory runs out",
        metavar="EXAMPLES",
        section="how it learns",
        rare=True,
    )
    epochs: int = option(3, "passes over the training data", metavar="EPOCHS")
    evaluations_per_epoch: int = option(
        1, "how often each epoch evaluates on the validation rows", metavar="COUNT", section="how it learns", rare=True
    )
    patience: int = option(
        2,
        "stop after this many evaluations without a lower validation log loss; 0 never stops early",
        metavar="COUNT",
        section="how it learns",
        rare=True,
    )
    rank: int = option(16, "rank of the adapters", metavar="RANK", section="adapters", rare=True)
    alpha: float = option(
        32.0,
        "alpha of the adapters: their output is scaled by alpha / rank",
        metavar="NUMBER",
        section="adapters",
        rare=True,
    )
    adapter_dropout: float = option(
        0.05, "dropout of the adapters, from 0 to below 1", metavar="FRACTION", section="adapters", rare=True
    )
    merge: bool = option(
        False,
        "merge the adapters into the weights at the end: faster to run, larger on disk",
        section="adapters",
        rare=True,
    )
    augment: str = option(
        "none",
        "how strongly to augment pictures; augmentation.html in the run's folder shows examples",
        choices=AUGMENTATIONS,
        rare=True,
    )
    flips: bool = option(
        False, "flip half of the pictures left to right; only if left and right do not matter", rare=True
    )
    class_weight: str | Mapping[int, float] | None = option(
        None, CLASS_WEIGHT_HELP, metavar="WEIGHTS", section="how it learns", rare=True
    )
    weight_column: str = option("", WEIGHT_COLUMN_HELP, metavar="NAME", section="how it learns", rare=True)
    focal_gamma: float = option(
        0.0, "gamma of the focal loss; 0 means cross-entropy", metavar="NUMBER", section="how it learns", rare=True
    )
    objective: str | None = option(
        None, f"{OBJECTIVE_HELP} (default: that of --from, or accuracy)", kind=str, rare=True
    )
    target_error_rate: float | None = option(
        None,
        f"{TARGET_ERROR_RATE_HELP} (default: that of --from, or 0, never)",
        kind=float,
        metavar="FRACTION",
        rare=True,
    )
    gradient_checkpointing: bool = option(False, "save memory by computing activations twice")
    keep_vision_tokens: float = option(
        50.0,
        "how much output of a frozen vision tower to keep for later epochs, in memory and then in the run's folder, "
        "if pictures are not augmented; 0 keeps none",
        metavar="GIGABYTES",
        rare=True,
    )
    bf16: bool = option(False, "compute in bfloat16; the weights keep their data type")
    group_by: str = group_by_option("rows that are held out together")
    validation_share: float = option(
        0.2,
        "fraction of rows held out if there is no --validation, and once more if there is a target error rate",
        metavar="FRACTION",
        rare=True,
    )
    save_steps: int = option(
        100, "steps between checkpoints, from which --resume continues", metavar="STEPS", rare=True
    )
    report_to: str = option(
        "auto",
        "experiment tracker: auto (TensorBoard if installed), none, wandb, ...",
        metavar="TRACKER",
        rare=True,
    )
    max_errors: str = option("", MAX_ERRORS_HELP, metavar="ROWS", rare=True)
    seed: int = option(0, "seed of the split, the order, dropout and augmentation", metavar="SEED", rare=True)

    def __post_init__(self) -> None:
        most_errors(self.max_errors, 0)
        check_choices(self)
        check_positive(
            self, "head_learning_rate", "batch_size", "epochs", "evaluations_per_epoch", "rank", "alpha", "save_steps"
        )
        check_share(self, "validation_share")
        check_share(self, "warmup", "adapter_dropout", allow_zero=True)
        if self.target_error_rate is not None:
            check_share(self, "target_error_rate", allow_zero=True)
        check_not_negative(self, "learning_rate", "micro_batch_size", "patience", "weight_decay", "focal_gamma", "seed")
        check_not_negative(self, "keep_vision_tokens")
        if self.objective is not None:
            Objective.parse(self.objective)
        object.__setattr__(self, "class_weight", class_weight_of(self.class_weight))
        if self.merge and self.method != "lora":
            raise ConfigError(
                f"{spelled('merge', True)} with {spelled('method', self.method)}: only adapters on whole weights "
                f"merge; use {spelled('method', 'lora')}"
            )

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
        for name, usual in (("augment", "none"), ("towers", "llm")):
            if (value := getattr(self, name)) != usual:
                found += without_effect(self, f"with {spelled(name, value)}", "keep_vision_tokens")
                break
        return found
