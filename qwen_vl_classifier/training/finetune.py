"""Stage 2 of the original recipe: train the model itself, from where the probe ended, and never to end up worse."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_vl_classifier.backbone.adapter_layout import base_weights
from qwen_vl_classifier.backbone.adapters import add_adapter, merge_adapter, read_adapter, write_adapter
from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.quantisation import without_advice
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.backbone.towers import train_towers
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.head import fold_line
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.augmentation import Augmentation
from qwen_vl_classifier.data.augmentation_page import write_augmentation_page
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError, TrainingError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.batching import Collator, Rows
from qwen_vl_classifier.training.probe import train
from qwen_vl_classifier.training.run_folder import close_run, digest_of, open_run
from qwen_vl_classifier.training.sketch import overlap, sketch
from qwen_vl_classifier.training.splitting import classes_of, groups_of, holdout, targets_of
from qwen_vl_classifier.training.step import TrainableClassifier
from qwen_vl_classifier.training.weighting import class_weights, example_weights

if TYPE_CHECKING:
    from qwen_vl_classifier.training.trainer import FinetuneTrainer

_NOT_OF_THE_RESULT = ("micro_batch_size", "save_steps", "report_to")  # options that change how a run goes, not where


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What `finetune` reached.

    Attributes:
        classifier: The best state on the validation rows; where none was better than the start, the start.
        history: Each look at the validation rows, the first at the start: step, epoch, mean training loss since the
            one before (`None` for the start), validation log loss and accuracy.
        improved: Whether any was better than the start.
        notes: What else there is to know, a sentence each.
    """

    classifier: Classifier
    history: list[dict[str, Any]]
    improved: bool
    notes: tuple[str, ...] = ()


def finetune(
    start: Classifier | Backbone,
    train_examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    config: FinetuneConfig | None = None,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    out: str | os.PathLike[str] | None = None,
    store: FeatureStore | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Train the model and its head together, from where a classifier stands.

    The state with the least validation log loss is kept, if that is less than the start's, and calibrated on the same
    rows. Under `torchrun` or `accelerate launch` all processes call this alike and get the same result.

    Args:
        start: Where to start; it is not changed. Of a backbone, the best probe is trained first.
        train_examples: Labelled examples of both classes.
        validation: Labelled examples of both classes that choose the best state; `None` holds out a share of the
            training rows, whole in pictures and groups. If the start has seen some of these, its head is trained
            again without them, so that it can be compared.
        config: Options.
        run: Folder for checkpoints, the course of the run and a page of changed pictures; `None` keeps none of it.
        resume: Go on with the run that the folder holds, with the same result as if it had not been interrupted.
        out: Folder in which to save the classifier before the run's checkpoints are removed, so that no moment is left
            at which an interruption loses what was trained; `None` saves nothing.
        store: Where features of probes are kept, if anywhere.
        progress: Show a progress line.

    Raises:
        DataError: Missing labels, one class only, or too few examples.
        ConfigError: Options that do not go together, or a folder that holds another run.
        TrainingError: Loss, gradient or validation logits are not finite; the message names the rows.
        StoppedError: The process was asked to end by SIGTERM, and the run saved its state.
        OutOfMemoryError: A single example does not fit.
        MissingExtraError: The extra `finetune` is not installed.
    """
    config = config or FinetuneConfig()
    with without_advice():
        for module in ("accelerate", "peft"):
            require(module, extra="finetune")
    if run is None and _world_size() > 1:
        raise ConfigError("several processes and no folder for the run: give run=, the same in all of them")
    targets_of(train_examples, what="training")
    notes: list[str] = []
    given = train_examples
    if validation is None:
        train_rows, validation_rows = holdout(train_examples, config.validation_share, config.seed, soft=True)
        validation = [train_examples[row] for row in validation_rows]
        train_examples = [train_examples[row] for row in train_rows]
    rows, held_out = (
        _rows(part, what, config) for part, what in ((train_examples, "training"), (validation, "validation"))
    )
    reading: dict[str, Any] = {"store": store, "progress": progress}
    with ExitStack() as stack:
        stack.enter_context(_own_randomness())
        folder = Path(run) if run is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        is_main, checkpoint = _open_together(folder, start, rows, held_out, config, resume=resume)
        if isinstance(start, Backbone):
            rung = _probe(start, train_examples, config, **reading)
        else:
            rung = _without(start, train_examples, validation, config, notes, **reading)
        classifier = _trainable_copy(rung, config)
        augmentation = Augmentation(config.augment, flips=config.flips)
        if run is not None and config.augment != "none" and is_main:
            write_augmentation_page(rows.examples, augmentation, folder / "augmentation.html", seed=config.seed)
        trainer = _trainer(classifier, rows, held_out, augmentation, config, folder, keep=run is not None)
        history = trainer.run(checkpoint, progress=progress)
        best = min(history, key=lambda entry: entry["validation_log_loss"])
        if best["step"] > 0:
            if _world_size() > 1:  # what was trained may be shared out among the processes
                classifier = _trainable_copy(rung, config)
            load_best(classifier, folder)
        trainer.accelerator.wait_for_everyone()  # all have read the best weights
    improved = best["step"] > 0
    if improved:
        begun = rung if isinstance(start, Backbone) else start
        reached = _finished(classifier, begun, rows, held_out, history, config, notes)
    elif isinstance(start, Backbone):
        reached = rung if given is train_examples else _probe(start, given, config, **reading)
    else:
        reached = start
    if out is not None and is_main:
        reached.save(out)
    if run is not None and is_main:
        close_run(folder)
    return FinetuneResult(reached, history, improved=improved, notes=tuple(notes))


def _without(
    start: Classifier,
    train_examples: Sequence[Example],
    validation: Sequence[Example],
    config: FinetuneConfig,
    notes: list[str],
    **reading: Any,
) -> Classifier:
    """Return the start as it would be had it not seen the validation rows; where that takes too much, say so."""
    seen = overlap(start.training.get("rows_sketch", []), validation)
    if not seen:
        return start
    if start.finetuned or start.backbone.changed or start.backbone.adapter is not None:
        notes.append(
            "the start was trained on some of the rows held out, which flatters it; give validation rows of their own"
        )
        return start
    notes.append("the start has seen the rows held out: its head was trained again without them, to be compared")
    options = TrainConfig(taps=str(start.tap), heads="linear" if start.spec.kind == "linear" else "mlp")
    if start.spec.units:
        options = replace(options, units=start.spec.units)
    probe = _probe(start.backbone, train_examples, config, options, **reading)
    probe.label_names = start.label_names
    return probe


def _probe(
    backbone: Backbone,
    examples: Sequence[Example],
    config: FinetuneConfig,
    options: TrainConfig | None = None,
    **reading: Any,
) -> Classifier:
    """Train the rung before, with the same weights of rows."""
    options = replace(
        options or TrainConfig(),
        class_weight=config.class_weight,
        weight_column=config.weight_column,
        seed=config.seed,
    )
    return train(examples, backbone=backbone, config=options, **reading).classifier


def _rows(examples: Sequence[Example], what: str, config: FinetuneConfig) -> Rows:
    targets = targets_of(examples, what=what)
    weights = example_weights(examples, config.weight_column)
    weights = weights * class_weights(targets, weights, config.class_weight)
    return Rows(examples, targets.astype(np.float32), weights.astype(np.float32))


def _record(start: Classifier | Backbone, rows: Rows, validation: Rows, config: FinetuneConfig) -> dict[str, Any]:
    """Return all that decides what a run computes."""
    backbone = start if isinstance(start, Backbone) else start.backbone
    begin: dict[str, Any] = {"backbone": backbone.fingerprint}
    if isinstance(start, Classifier):
        begin |= {"tap": str(start.tap), "head": {name: t.sum().item() for name, t in start.head.state_dict().items()}}
    return {
        "config": {name: value for name, value in asdict(config).items() if name not in _NOT_OF_THE_RESULT},
        "start": begin,
        "training rows": digest_of(rows.examples),
        "validation rows": digest_of(validation.examples),
    }


def _world_size() -> int:
    """Return the number of processes, as launchers say it before any of them has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _open_together(
    folder: Path,
    start: Classifier | Backbone,
    rows: Rows,
    validation: Rows,
    config: FinetuneConfig,
    *,
    resume: bool,
) -> tuple[bool, Path | None]:
    """Let the first of all processes open the run; return whether this is it, and the checkpoint to go on from."""
    record = _record(start, rows, validation, config)
    if _world_size() == 1:
        return True, open_run(folder, record, resume=resume)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    backbone = start if isinstance(start, Backbone) else start.backbone
    processes = PartialState(cpu=backbone.device.type == "cpu")
    checkpoint = open_run(folder, record, resume=resume) if processes.is_main_process else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    return processes.is_main_process, checkpoint


def _trainable_copy(start: Classifier, config: FinetuneConfig) -> Classifier:
    """Load the backbone again, no deeper than the tap, and let what is to train, train."""
    source = start.backbone
    smallest, largest = source.pixel_limits
    backbone = Backbone.load(
        source.folder,
        device=str(source.device),
        # Steps as small as these vanish in bfloat16 weights; adapters are float32 over weights of any type.
        dtype="float32" if config.method == "full" else source.dtype,
        num_layers=None if start.tap.layer == LAST_NORM else start.tap.layer,
        min_pixels=smallest,
        max_pixels=largest,
        quantization="4bit" if config.method == "qlora" else None,
    )
    backbone.name, backbone.revision = source.name, source.revision
    if source.changed:  # trained before and not saved: the files know nothing of it
        weights = base_weights(source.model)
        backbone.model.load_state_dict({name: weights[name] for name in backbone.model.state_dict()})
        backbone.mark_changed()
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
    )


def _trainer(
    classifier: Classifier,
    rows: Rows,
    validation: Rows,
    augmentation: Augmentation,
    config: FinetuneConfig,
    folder: Path,
    *,
    keep: bool,
) -> FinetuneTrainer:
    from qwen_vl_classifier.training.trainer import FinetuneTrainer, PackedClassifier  # an extra, and seconds

    report_to = [] if config.report_to == "none" else [config.report_to]
    if config.report_to == "auto":
        report_to = ["tensorboard"] if keep and importlib.util.find_spec("tensorboard") else []
    model = PackedClassifier(classifier.backbone, classifier.tap, classifier.head)
    collator = Collator(rows, classifier.backbone.processor, augmentation, config.seed)
    try:
        return FinetuneTrainer(model, rows, validation, collator, config, folder, report_to)
    except (ValueError, RuntimeError) as error:
        if "is not supported" in str(error) or "requires" in str(error):  # the integrations' own words
            raise ConfigError(
                f"report_to {config.report_to!r}: {str(error).splitlines()[0]}; give auto, none or what is installed"
            ) from error
        raise


def load_best(classifier: Classifier, folder: Path) -> None:
    """Put the best weights of a run into a classifier that is as the run began."""
    from qwen_vl_classifier.training.trainer import BEST, load_trained_weights

    model = TrainableClassifier(classifier.backbone, classifier.tap, classifier.head)
    load_trained_weights(model, folder / BEST)


def _finished(
    classifier: Classifier,
    start: Classifier,
    rows: Rows,
    validation: Rows,
    history: list[dict[str, Any]],
    config: FinetuneConfig,
    notes: list[str],
) -> Classifier:
    """Freeze what was trained, and calibrate it."""
    classifier.backbone.model.requires_grad_(False).eval()
    classifier.head.requires_grad_(False).eval()
    if config.merge:
        merge_adapter(classifier.backbone)
    classifier.backbone.mark_changed()
    classifier.finetuned = start.finetuned or classifier.backbone.changed
    classifier.training = {
        "method": config.method,
        "training_rows": len(rows),
        "validation_rows": len(validation),
        "validation_log_loss": min(entry["validation_log_loss"] for entry in history),
        "options": asdict(config),
        "history": history,
        "rows_sketch": sketch([*rows.examples, *validation.examples]),
        "start": start.training,
    }
    labelled = [
        replace(example, label=int(label))
        for example, label in zip(validation.examples, classes_of(validation.targets.astype(np.float64)), strict=True)
    ]
    groups = groups_of(labelled)
    try:
        calibrated = classifier.calibrate(labelled, objective=config.objective, groups=groups)
    except TrainingError as error:  # out of reach on these rows, which is no reason to lose what was trained
        notes.append(f"{error}; the threshold is that for accuracy")
        calibrated = classifier.calibrate(labelled, groups=groups)
    # From few rows, calibration is careful: it trusts them less than they say, which may cost more than was gained.
    if calibrated.training["calibration"]["log_loss_after"] > history[0]["validation_log_loss"]:
        return classifier
    return calibrated


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the caller's random numbers as they are: transformers seeds them all."""
    python, numpy_state = random.getstate(), np.random.get_state()  # the one that is seeded
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
