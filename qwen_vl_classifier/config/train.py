"""Options of `train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vl_classifier.config.fields import (
    MAX_ERRORS_HELP,
    check_not_negative,
    check_positive,
    check_share,
    class_weight_of,
    group_by_option,
    most_errors,
    option,
    split_list,
    without_effect,
)
from qwen_vl_classifier.config.spelling import did_you_mean, named, spelled
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.objectives import OBJECTIVES, Objective

HEADS = ("zero-shot", "calibrated", "linear", "mlp")
"""The heads that `train` compares, the simpler first."""

TARGET_ERROR_RATE_HELP = (
    'target error rate over all rows, such as 0.05; predictions near the threshold become "abstain"'
)
"""What `target_error_rate` means, in every verb that has it; `classifier.abstention` has the whole of it."""

OBJECTIVE_HELP = f"what the threshold optimises: {OBJECTIVES}"
CLASS_WEIGHT_HELP = "weights of the classes: none, balanced, or a list such as 0:1,1:5 (default: none)"
WEIGHT_COLUMN_HELP = "column with the weight of each row (default: all weigh the same)"
"""The help of further options that `train` and `finetune` have."""

_FEWEST_FOLDS = 2
_OF_MLP_HEADS = (
    "units",
    "dropout",
    "learning_rate",
    "weight_decay",
    "batch_size",
    "epochs",
    "patience",
    "focal_gamma",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Options of training: which taps and heads to try on features, and how to choose the best.

    The mlp head is that of the original API: Linear(hidden, 512), ReLU, Dropout(0.1), Linear(512, 2).

    `class_weight` is `None`, "balanced" (both classes weigh the same in all), or the weight of a row of each class:
    `{0: 1.0, 1: 5.0}`, on the command line `0:1,1:5`.

    Raises:
        ConfigError: A value is out of its range.
    """

    taps: str = option(
        "auto",
        "where to read features, as POOLING:LAYER: auto, or a list such as mean:-1,last:24:normed",
        metavar="TAPS",
        rare=True,
    )
    heads: str = option(
        "auto", "heads to try: auto (all), or a list of zero-shot, calibrated, linear and mlp", rare=True
    )
    exportable: bool = option(
        False, "try only what `export` can move to other engines, and report what that costs", rare=True
    )
    folds: int = option(
        5, "folds of cross-validation; fewer if there are too few rows or groups", metavar="FOLDS", rare=True
    )
    group_by: str = group_by_option("rows that stay in one fold")
    objective: str = option("accuracy", OBJECTIVE_HELP)
    target_error_rate: float = option(0.0, f"{TARGET_ERROR_RATE_HELP} (default: 0, never)", metavar="FRACTION")
    class_weight: str | Mapping[int, float] | None = option(None, CLASS_WEIGHT_HELP, metavar="WEIGHTS", rare=True)
    weight_column: str = option("", WEIGHT_COLUMN_HELP, metavar="NAME", rare=True)
    sampled_column: str = option(
        "",
        'column that says how each row was chosen; results are then measured on its rows marked "random" alone',
        metavar="NAME",
        rare=True,
    )
    focal_gamma: float = option(
        0.0,
        "gamma of the mlp head's focal loss; 0 means cross-entropy",
        metavar="NUMBER",
        section="the mlp head",
        rare=True,
    )
    yes: str = option(
        "Yes", "the model's answer that means class 1, for zero-shot; one token", metavar="WORD", rare=True
    )
    no: str = option("No", "the model's answer that means class 0, for zero-shot; one token", metavar="WORD", rare=True)
    units: int = option(512, "width of the mlp head's hidden layer", metavar="UNITS", section="the mlp head", rare=True)
    dropout: float = option(
        0.1, "dropout of the mlp head, from 0 to below 1", metavar="FRACTION", section="the mlp head", rare=True
    )
    learning_rate: float = option(
        1e-3, "learning rate of the mlp head", metavar="NUMBER", section="the mlp head", rare=True
    )
    weight_decay: float = option(
        0.01, "weight decay of the mlp head", metavar="NUMBER", section="the mlp head", rare=True
    )
    batch_size: int = option(
        64, "rows in one training step of the mlp head", metavar="ROWS", section="the mlp head", rare=True
    )
    epochs: int = option(
        200, "most passes over the data for the mlp head", metavar="EPOCHS", section="the mlp head", rare=True
    )
    patience: int = option(
        10,
        "stop training the mlp head after this many epochs without a lower log loss on held-out rows",
        metavar="EPOCHS",
        section="the mlp head",
        rare=True,
    )
    validation_share: float = option(
        0.2,
        'fraction of rows held out to set where predictions become "abstain", if there is no --validation',
        metavar="FRACTION",
        rare=True,
    )
    max_errors: str = option("", MAX_ERRORS_HELP, metavar="ROWS", rare=True)
    seed: int = option(0, "seed of the split, the initial weights and the order of rows", metavar="SEED", rare=True)

    def __post_init__(self) -> None:
        most_errors(self.max_errors, 0)
        check_positive(self, "units", "learning_rate", "batch_size", "epochs", "patience")
        check_share(self, "dropout", "target_error_rate", allow_zero=True)
        check_share(self, "validation_share")
        check_not_negative(self, "weight_decay", "seed", "focal_gamma")
        if self.folds < _FEWEST_FOLDS:
            raise ConfigError(f"{named('folds')} {self.folds}: give {_FEWEST_FOLDS} or more")
        unknown = [name for name in self.head_names if name not in HEADS]
        if unknown:
            raise ConfigError(
                f"{named('heads')} {self.heads!r} name {unknown[0]!r}; give auto, or a list of {', '.join(HEADS)}"
                f"{did_you_mean(unknown[0], HEADS)}"
            )
        if self.exportable and "mlp" in split_list(self.heads):
            raise ConfigError(
                f"{named('heads')} {self.heads!r} with {spelled('exportable', True)}: other engines have no mlp "
                "head; give linear, zero-shot or calibrated"
            )
        Objective.parse(self.objective)
        object.__setattr__(self, "class_weight", class_weight_of(self.class_weight))

    @property
    def head_names(self) -> tuple[str, ...]:
        """The heads to try, each once."""
        if self.heads == "auto":
            return tuple(head for head in HEADS if not (self.exportable and head == "mlp"))
        return split_list(self.heads) or (self.heads,)

    def unused(self) -> list[str]:
        """Return a sentence for each option that was given and has no effect beside the others."""
        names, found = self.head_names, []
        if "mlp" not in names:
            found += without_effect(self, "without mlp heads", *_OF_MLP_HEADS)
        if not {"zero-shot", "calibrated"} & {*names}:
            found += without_effect(self, "without zero-shot heads", "yes", "no")
        if not self.target_error_rate:
            found += without_effect(self, f"without {spelled('target_error_rate')}", "validation_share")
        return found
