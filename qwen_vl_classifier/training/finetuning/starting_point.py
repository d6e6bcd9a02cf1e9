"""Where fine-tuning starts: the rung before, without the rows held out, and a copy of it that can train."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from qwen_vl_classifier.backbone.adapters import add_adapter, merge_adapter, read_adapter, write_adapter
from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import base_weights
from qwen_vl_classifier.backbone.checkpoint.weight_names import experts_of_array
from qwen_vl_classifier.backbone.devices import spelled_devices
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.backbone.towers import train_towers
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.head import fold_line
from qwen_vl_classifier.classifier.rethresholding import threshold_was_set
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError, TrainingError
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.finetuning.final_classifier import Answers
from qwen_vl_classifier.training.overlap import may_have_seen
from qwen_vl_classifier.training.probe.probe import train

_OVER_THE_SAME = (("lora", None), ("qlora", "4bit"))  # methods that train over a start of this quantisation as it is


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rung before is trained and measured.

    Attributes:
        probe: How heads are trained where a backbone was given.
        store: Where features are kept, if anywhere.
        progress: Show progress bars.
    """

    probe: TrainConfig
    store: FeatureStore | None
    progress: bool


def check_start(start: Classifier | Backbone, config: FinetuneConfig) -> None:
    """Refuse a start that the method could train but not save, before any work.

    Raises:
        ConfigError: The method puts the backbone in 4 bits, which cannot hold what the start has learned.
    """
    if config.method != "qlora" or isinstance(start, Backbone):
        return
    if start.finetuned or start.backbone.changed or start.backbone.adapter is not None:
        raise ConfigError(
            f"{spelled('method', 'qlora')} from a classifier that was fine-tuned: weights in 4 bits cannot hold what "
            f"it has learned; expected a probe or a checkpoint to start from; use {spelled('method', 'lora')} or full"
        )


def rung_before(
    start: Classifier | Backbone,
    train_examples: Sequence[Example],
    held_out: Sequence[Example],
    config: FinetuneConfig,
    notes: list[str],
    reading: Reading,
) -> Classifier:
    """Return the classifier that training starts from, and that it has to beat on the rows held out.

    Args:
        start: What was given; of a backbone, the best probe is trained.
        train_examples: What the rung may be trained on.
        held_out: What it must not have seen; where it has and that cannot be helped, a note says so.
        config: Options.
        notes: Gets a sentence where the start is not taken as it is.
        reading: How.
    """
    if isinstance(start, Backbone):
        return probe(start, train_examples, config, reading)
    if not may_have_seen(start.training, held_out):
        return start
    if start.finetuned or start.backbone.changed or start.backbone.adapter is not None:
        notes.append(
            "the start was trained on some of the held-out rows, so it looks better than it is; give validation rows "
            "of their own"
        )
        return start
    notes.append(
        "the start was trained on the held-out rows: for a fair comparison, its head was trained again without them"
    )
    rung = probe(start.backbone, train_examples, config, reading, options=_options_of(start))
    rung.label_names = start.label_names
    return rung


def _options_of(start: Classifier) -> TrainConfig:
    """Return the options that train the head of a start again: those of its record, for its own tap and kind of head.

    A record may hold anything, so what does not fit is left at its default.
    """
    recorded = start.training.get("options", {})
    known = {item.name for item in fields(TrainConfig)}
    try:
        options = TrainConfig(**{name: value for name, value in recorded.items() if name in known})
    except (AttributeError, TypeError, ConfigError):
        options = TrainConfig()
    head = start.training.get("chosen")
    if head not in ("zero-shot", "calibrated"):
        head = start.spec.kind
    options = replace(options, taps=str(start.tap), heads=head, target_error_rate=0.0)
    return replace(options, units=start.spec.units) if start.spec.units else options


def probe(
    backbone: Backbone,
    examples: Sequence[Example],
    config: FinetuneConfig,
    reading: Reading,
    *,
    options: TrainConfig | None = None,
    **answers: Any,
) -> Classifier:
    """Train the rung before, with the same weights of rows.

    Args:
        backbone: What reads the features.
        examples: What to train on.
        config: Of the fine-tuning.
        reading: How.
        options: How heads are trained, instead of what `reading` says.
        answers: Other options of `TrainConfig`: objective, error rate.
    """
    options = replace(
        options or reading.probe,
        class_weight=config.class_weight,
        weight_column=config.weight_column,
        group_by=config.group_by,
        seed=config.seed,
        **{"objective": "accuracy", "target_error_rate": 0.0, **answers},
    )
    trained = train(examples, backbone=backbone, config=options, store=reading.store, progress=reading.progress)
    return trained.classifier


def trainable_copy(start: Classifier, config: FinetuneConfig) -> Classifier:
    """Copy the start, no deeper than the tap, and make trainable what is to train.

    The weights are read again only where they will change or are wanted in another type; adapters train over the
    start's own, which are in memory once.
    """
    source = start.backbone
    layers = source.num_layers if start.tap.layer == LAST_NORM else start.tap.layer
    if source.adapter is None and (config.method, source.quantization) in _OVER_THE_SAME:
        backbone = _over_the_same_weights(source, layers)
    else:
        backbone = _loaded_again(source, layers, config)
    if source.adapter is not None:  # what it learned goes into the weights, and the next one is put on top
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(source, Path(folder) / "adapter")
            read_adapter(backbone, Path(folder) / "adapter")
        merge_adapter(backbone)
    if config.method == "full":
        train_towers(backbone, config.towers, start.tap)
    else:
        add_adapter(
            backbone,
            towers=config.towers,
            tap=start.tap,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.adapter_dropout,
            seed=config.seed,
        )
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    head = copy.deepcopy(start.head)
    fold_line(head, 1 / start.temperature)
    return Classifier(
        backbone,
        start.tap,
        head.requires_grad_(True).to(backbone.device),
        start.spec,
        label_names=start.label_names,
        average=start.average,
    )


def _loaded_again(source: Backbone, layers: int, config: FinetuneConfig) -> Backbone:
    """Load the first layers of a backbone once more, in the type that the method trains."""
    smallest, largest = source.pixel_limits
    backbone = Backbone.load(
        source.folder,
        device=spelled_devices(source.devices),
        # Steps as small as these vanish in bfloat16 weights; adapters are float32 over weights of any type.
        dtype="float32" if config.method == "full" else source.dtype,
        num_layers=layers,
        min_pixels=smallest,
        max_pixels=largest,
        quantization="4bit" if config.method == "qlora" else None,
        chat_template=None if source.processor.brings_template else source.processor.chat_template,
        max_text_tokens=source.processor.max_text_tokens,
    )
    backbone.name, backbone.revision, backbone.local_folder = source.name, source.revision, source.local_folder
    if source.changed:  # trained before and not saved: the files know nothing of it
        weights = base_weights(source.model)
        backbone.model.load_state_dict({name: weights[name] for name in backbone.model.state_dict()})
        backbone.mark_changed()
    return backbone


def _over_the_same_weights(source: Backbone, layers: int) -> Backbone:
    """Return a backbone with modules of its own for the first layers, whose weights are those of another.

    Whole parameters are its own too, so that merging can give one of them other weights; what nobody may do is write
    into them. Quantised ones carry their scales, and are never merged into.
    """
    shared = {
        id(weight): weight if source.quantization else nn.Parameter(weight.data, requires_grad=False)
        for weight in source.model.parameters()
    }
    model: Any = copy.deepcopy(source.model, shared)
    settings = model.config.get_text_config()
    settings.num_hidden_layers = layers
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:layers]
    model.language_model.layers = model.language_model.layers[:layers]
    backbone = copy.copy(source)
    backbone.model = model
    return backbone


def changes_of(start: Classifier | Backbone, config: FinetuneConfig, answers: Answers) -> list[str]:
    """Return notes on how the result will differ from the start, and what will not train, beyond the options."""
    notes = []
    backbone = start if isinstance(start, Backbone) else start.backbone
    if backbone.quantization and config.method != "qlora":
        notes.append(
            f"the start is quantised to {backbone.quantization}, but {spelled('method', config.method)} trains and "
            f"saves whole weights; {spelled('method', 'qlora')} trains adapters on 4-bit weights"
        )
    if config.method != "full" and any(experts_of_array(name) for name, _ in backbone.model.named_parameters()):
        notes.append(
            f"the experts and routers of {backbone.family.name} do not train, since adapters go beside linear layers "
            f"only; {spelled('method', 'full')} trains all weights"
        )
    if isinstance(start, Classifier) and threshold_was_set(start.training) and "objective" not in answers.requested:
        notes.append(
            f"the start's threshold {start.threshold:g} was set by hand; what is trained gets one for "
            f"{answers.objective}: set it again afterwards, or give {spelled('objective')}"
        )
    if (
        isinstance(start, Classifier)
        and start.abstention
        and not answers.target_error_rate
        and "target_error_rate" not in answers.requested
    ):
        notes.append(
            "the start abstains, and its record does not say for which error rate; what is trained never abstains: "
            f"give {spelled('target_error_rate')}"
        )
    return notes


def probe_of_all(
    backbone: Backbone,
    examples: Sequence[Example],
    config: FinetuneConfig,
    answers: Answers,
    notes: list[str],
    reading: Reading,
) -> Classifier:
    """Train the probe on all rows, with the objective and error rate of `answers`, or else for accuracy."""
    options: dict[str, Any] = {"objective": answers.objective}
    if answers.target_error_rate:
        options |= {"target_error_rate": answers.target_error_rate, "validation_share": config.validation_share}
    try:
        reached = probe(backbone, examples, config, reading, **options)
    except TrainingError as error:
        notes.append(f"{error}; the threshold is that for accuracy")
        reached = probe(backbone, examples, config, reading, **options | {"objective": "accuracy"})
    reached.label_names = answers.label_names
    reached.training["notes"] = [*reached.training["notes"], *notes]
    return reached
