"""Every option of every verb, declared once with its default and its help.

The command line makes its flags from these classes (`add_flags`, `from_flags`), so that a flag, a keyword and a line
of help can never disagree.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.objectives import Objective

Config = TypeVar("Config")

METHODS = ("lora", "qlora", "full")
"""What trains in fine-tuning: adapters, adapters on 4-bit weights, or the weights themselves."""

TOWERS = ("llm", "llm+vision", "all")
"""Where: the decoder; the blocks of the vision tower too; patch embedding, mergers and token embeddings too."""

SCHEDULES = ("cosine", "linear", "constant")

AUGMENTATIONS = ("none", "light", "strong")
"""How training sees pictures: as they are; taken again from nearly the same place; by another hand and camera."""

ENGINES = ("local", "ray")
"""What runs the workers that score."""

SCORE_FORMATS = ("parquet", "jsonl", "csv")

_ADAPTER_RATE, _FULL_RATE = 2e-4, 1e-5
HEADS = ("zero-shot", "calibrated", "linear", "mlp")
"""The heads that `train` compares, the simpler first."""

_FEWEST_FOLDS = 2

LOG_FORMATS = ("json", "text")

API_KEY_VARIABLE = "QWEN_VL_CLASSIFIER_API_KEY"  # the name of a variable, not a key
"""Where `serve` looks for its key if no file is named."""


def option(default: Any, help: str, *, choices: tuple[Any, ...] | None = None) -> Any:
    """Declare one option of a configuration.

    Args:
        default: Its value where none is given; its type is the type of the flag.
        help: One line of help, in lower case, with the unit.
        choices: The values that are allowed, if few.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How heads are trained on features, and how the best is chosen.

    The mlp head is that of the original API: Linear(hidden, 512), ReLU, Dropout(0.1), Linear(512, 2).

    `class_weight` is `None`, "balanced" (both classes weigh the same in all), or the weight of a row of each class:
    `{0: 1.0, 1: 5.0}`, on the command line `0:1,1:5`.

    Raises:
        ConfigError: A value is out of its range.
    """

    taps: str = option("auto", "where to read: auto, or a list such as mean:-1,last:24; the best one is kept")
    heads: str = option("auto", "heads to try: auto for all, or a list of zero-shot, calibrated, linear and mlp")
    folds: int = option(5, "parts of the data in cross-validation; fewer where there are too few rows or groups")
    objective: str = option(
        "accuracy", "what the threshold is for: accuracy, f1, balanced, recall>=R, precision>=P or cost=FN:FP"
    )
    max_error: float = option(0.0, "abstain so that at most this share of answers is wrong; 0 never abstains")
    class_weight: str | Mapping[int, float] | None = option(
        None, "weights of the classes: none, balanced, or 0:W,1:W such as 0:1,1:5"
    )
    weight_column: str = option("", "column that holds the weight of each row; empty weighs all alike")
    focal_gamma: float = option(0.0, "focal loss of mlp heads: above 0, rows that are right already count less")
    yes: str = option("Yes", "word of class 1 in zero-shot; one token")
    no: str = option("No", "word of class 0 in zero-shot; one token")
    units: int = option(512, "width of the mlp head's hidden layer")
    dropout: float = option(0.1, "dropout of the mlp head, from 0 to below 1")
    learning_rate: float = option(1e-3, "learning rate of the mlp head")
    weight_decay: float = option(0.01, "weight decay of the mlp head")
    batch_size: int = option(64, "rows in one step of the mlp head")
    epochs: int = option(200, "most passes of the mlp head over the features")
    patience: int = option(10, "stop the mlp head after so many epochs without a better log loss on held-out rows")
    validation_share: float = option(
        0.2, "share of rows held out to choose the abstention band on, where no validation data is given"
    )
    seed: int = option(0, "seed of split, initial weights and order")

    def __post_init__(self) -> None:
        _check_positive(self, "units", "learning_rate", "batch_size", "epochs", "patience")
        _check_share(self, "dropout", "max_error", allow_zero=True)
        _check_share(self, "validation_share")
        _check_not_negative(self, "weight_decay", "seed", "focal_gamma")
        if self.folds < _FEWEST_FOLDS:
            raise ConfigError(f"folds {self.folds}: give {_FEWEST_FOLDS} or more")
        unknown = [name for name in self.head_names if name not in HEADS]
        if unknown:
            raise ConfigError(f"heads {self.heads!r} name {unknown[0]!r}; give auto, or a list of {', '.join(HEADS)}")
        Objective.parse(self.objective)
        object.__setattr__(self, "class_weight", _class_weight(self.class_weight))

    @property
    def head_names(self) -> tuple[str, ...]:
        """The heads to try, each once."""
        if self.heads == "auto":
            return HEADS
        return tuple(dict.fromkeys(name.strip() for name in self.heads.split(",")))


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
    objective: str = option(
        "accuracy", "what the threshold is chosen for: accuracy, f1, balanced, recall>=R, precision>=P or cost=FN:FP"
    )
    gradient_checkpointing: bool = option(False, "trade time for memory")
    bf16: bool = option(False, "run matrix products in bfloat16")
    validation_share: float = option(0.2, "share of rows held out where no validation data is given")
    save_steps: int = option(100, "steps between checkpoints, from which a run that was killed goes on")
    report_to: str = option("auto", "what shows the course: auto (TensorBoard, if installed), none, wandb or others")
    seed: int = option(0, "seed of split, order, dropout and augmentation")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_positive(
            self, "head_learning_rate", "batch_size", "epochs", "evaluations_per_epoch", "rank", "alpha", "save_steps"
        )
        _check_share(self, "validation_share")
        _check_share(self, "warmup", "adapter_dropout", allow_zero=True)
        _check_not_negative(
            self, "learning_rate", "micro_batch_size", "patience", "weight_decay", "focal_gamma", "seed"
        )
        Objective.parse(self.objective)
        object.__setattr__(self, "class_weight", _class_weight(self.class_weight))
        if self.merge and self.method != "lora":
            raise ConfigError(f"merge with method {self.method}: only adapters on whole weights merge; use method lora")

    @property
    def rate(self) -> float:
        """The learning rate of the backbone."""
        return self.learning_rate or (_FULL_RATE if self.method == "full" else _ADAPTER_RATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """What an evaluation looks at beside the metrics.

    Raises:
        ConfigError: A value is out of its range.
    """

    slice_by: str = option("", "columns to slice by beside picture size and text length, such as kind,source")
    slice_rows: int = option(20, "fewest rows of a slice")
    checks: bool = option(True, "score again with other pictures and texts: does it look, does it read")
    check_rows: int = option(500, "most rows that these checks score again, drawn at random")
    resamples: int = option(2000, "resamples of the bootstrap behind the intervals")
    seed: int = option(0, "seed of resamples, of the rows to check and of their other pictures and texts")

    def __post_init__(self) -> None:
        _check_positive(self, "slice_rows", "check_rows", "resamples")
        _check_not_negative(self, "seed")

    @property
    def slice_columns(self) -> tuple[str, ...]:
        """The columns to slice by, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.slice_by.split(",") if name.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """How a large data set is scored.

    Raises:
        ConfigError: A value is out of its range.
    """

    shard_size: int = option(1000, "rows in one output file")
    format: str = option("parquet", "what shards are written as", choices=SCORE_FORMATS)
    engine: str = option("local", "where workers run: this machine, or a Ray cluster (extra scale)", choices=ENGINES)
    workers: int = option(0, "worker processes; 0 takes one for each GPU, or one where there is none")
    threads: int = option(0, "threads of each worker on the CPU; 0 shares out the cores")
    group_by_image: bool = option(False, "never part neighbouring rows of one picture by the end of a shard")
    max_errors: str = option("", "stop once more rows than this have errors: a number, or a share such as 5%%")
    features: str = option("", "keep features in this folder; what is kept is never computed again")
    token_budget: int = option(0, "most tokens in one batch; 0 chooses by free memory once, and keeps to it")
    url_hosts: str = option("", "hosts from which pictures may be fetched, such as example.com,cdn.example.com")
    ray_address: str = option("", "address of the Ray cluster; empty starts one on this machine")
    gpus_per_worker: float = option(0.0, "GPUs of each Ray worker; 0 runs on CPUs")
    dry_run: bool = option(False, "score a sample, and say how long all would take; write nothing")

    def __post_init__(self) -> None:
        _check_positive(self, "shard_size")
        _check_not_negative(self, "workers", "threads", "token_budget", "gpus_per_worker")
        _check_choices(self)
        self.most_errors(0)

    def most_errors(self, rows: int) -> float:
        """Return how many of so many rows may have errors; infinity where any number may."""
        if not self.max_errors:
            return math.inf
        number, percent, rest = self.max_errors.strip().partition("%")
        try:
            most = float(number) if percent else int(number)
        except ValueError:
            most = -1
        if rest or not 0 <= most < math.inf or (percent and most > 100):
            raise ConfigError(f"max_errors {self.max_errors!r}: give a number of rows, or a share from 0% to 100%")
        return most / 100 * rows if percent else most


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How classifiers are served over HTTP.

    Attributes:
        classifiers: Folders of saved classifiers; each is served by its folder's name, and those of one backbone share
            its passes.

    Raises:
        ConfigError: A value is out of its range, or would let the whole network in.
    """

    classifiers: tuple[str, ...] = field(default=(), metadata={"flag": False})
    host: str = option("127.0.0.1", "address to listen on; other than loopback needs an API key")
    port: int = option(8000, "port to listen on; 0 lets the system choose")
    api_key_file: str = option("", f"file that holds the key which clients send; else {API_KEY_VARIABLE} is looked at")
    insecure: bool = option(False, "allow to listen on other than loopback without an API key")
    max_batch: int = option(32, "most examples in one pass")
    max_batch_tokens: int = option(16_384, "most tokens in one pass; a longer example runs alone")
    queue_size: int = option(256, "examples that may wait; beyond that the answer is 429")
    queue_bytes: int = option(1_000_000_000, "bytes of bodies and pictures held for all requests; beyond that 429")
    deadline: float = option(30.0, "seconds after which a request that is not done is answered 504")
    grace: float = option(30.0, "seconds that accepted requests have to finish after SIGTERM")
    header_timeout: float = option(5.0, "seconds in which the headers of a request must arrive")
    body_timeout: float = option(10.0, "seconds in which its body must arrive; else the answer is 408")
    max_body_bytes: int = option(32_000_000, "largest request body, in bytes")
    max_items: int = option(64, "most examples in one request")
    max_text_chars: int = option(8_000, "longest text of one example, in characters")
    max_image_bytes: int = option(10_000_000, "largest image file, in bytes")
    max_pixels: int = option(25_000_000, "largest picture, width times height as its header says")
    decode_workers: int = option(2, "processes that decode pictures")
    decode_timeout: float = option(5.0, "seconds that one picture may take to decode")
    decode_memory: int = option(1_000_000_000, "bytes of memory that one decoding process may take")
    url_hosts: str = option("", "hosts whose pictures may be fetched by URL, such as img.example.org,.cdn.example.org")
    image_root: str = option("", "folder whose pictures may be named by path; empty allows no paths")
    allowed_hosts: str = option("", "further names under which clients may reach a server on loopback")
    cors_origins: str = option("", "origins whose pages may call this server, such as https://example.org")
    log_format: str = option("json", "json or text", choices=LOG_FORMATS)
    tracing: bool = option(False, "send OpenTelemetry traces, as its own environment variables say")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format {self.log_format!r}: give one of {', '.join(LOG_FORMATS)}")
        _check_positive(
            self,
            *("max_batch", "max_batch_tokens", "queue_size", "queue_bytes", "deadline", "grace", "header_timeout"),
            *("body_timeout", "max_body_bytes", "max_items", "max_text_chars", "max_image_bytes", "max_pixels"),
            *("decode_workers", "decode_timeout", "decode_memory"),
        )
        for name in ("deadline", "grace", "header_timeout", "body_timeout", "decode_timeout"):
            if getattr(self, name) == math.inf:
                raise ConfigError(f"{name} inf: give a number of seconds, so that nothing can wait for ever")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port}: give 0 to 65535")
        has_key = self.api_key_file or os.environ.get(API_KEY_VARIABLE)
        if not (has_key or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host!r} can be reached from elsewhere and no API key is asked for; give --api-key-file or "
                f"{API_KEY_VARIABLE}, listen on 127.0.0.1, or say --insecure if something in front checks who calls"
            )

    def names_of(self, option: str) -> tuple[str, ...]:
        """Return the parts of an option that is a list with commas, such as `url_hosts`."""
        return tuple(part.strip() for part in getattr(self, option).split(",") if part.strip())


def add_flags(parser: argparse._ActionsContainer, config: type[Any], *, only: Collection[str] | None = None) -> None:
    """Add one flag for every option of a configuration class, or for some by name."""
    for item in dataclasses.fields(config):
        if not item.metadata.get("flag", True) or (only is not None and item.name not in only):
            continue
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata["help"] + " (default: %(default)s)"
        if isinstance(item.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=item.default, help=text)
        else:
            parser.add_argument(
                flag,
                type=str if item.default is None else type(item.default),
                default=item.default,
                choices=item.metadata["choices"],
                metavar=None if item.metadata["choices"] else item.name.rsplit("_", maxsplit=1)[-1].upper(),
                help=text,
            )


def from_flags(config: type[Config], flags: argparse.Namespace, **extra: Any) -> Config:
    """Build a configuration from parsed flags."""
    names = [
        item.name
        for item in dataclasses.fields(config)  # type: ignore[arg-type]  # always one of the classes above
        if item.metadata.get("flag", True)
    ]
    return config(**{name: getattr(flags, name) for name in names}, **extra)


def _class_weight(value: str | Mapping[int, float] | None) -> str | dict[int, float] | None:
    """Bring the weights of the classes to one form: `None`, "balanced" or the weight of each class."""
    if value is None or value in ("none", "balanced"):
        return "balanced" if value == "balanced" else None
    try:
        pairs = [part.split(":") for part in value.split(",")] if isinstance(value, str) else [*value.items()]
        weights = {int(label): float(weight) for label, weight in pairs}
    except (AttributeError, TypeError, ValueError):
        weights = {}
    if weights.keys() != {0, 1} or not all(0 < weight < math.inf for weight in weights.values()):
        raise ConfigError(f"class_weight {value!r}: give none, balanced, or a weight above 0 for each class: 0:1,1:5")
    return weights


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address; of names, `localhost` alone is known to be such."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_choices(config: Any) -> None:
    for item in dataclasses.fields(config):
        value, choices = getattr(config, item.name), item.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{item.name} {value!r}: give one of {', '.join(choices)}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} {getattr(config, name)}: give a number above 0")


def _check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} {getattr(config, name)}: give 0 or more")


def _check_share(config: Any, *names: str, allow_zero: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if not (0 < value < 1 or (allow_zero and value == 0)):
            raise ConfigError(f"{name} {value}: give a share {'from' if allow_zero else 'above'} 0 to below 1")
