"""Stage 2 of the original recipe: train the model itself, from where the probe ended, and never to end up worse."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen_vl_classifier.backbone.adapters import merge_adapter
from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.quantisation import without_advice
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.augmentation import Augmentation
from qwen_vl_classifier.data.augmentation_page import write_augmentation_page
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import PLAIN_NAMES, class_names_of
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.errors import ConfigError, TrainingError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.batching import Collator, Rows
from qwen_vl_classifier.training.finishing import Answers, Measure, finish, keep_start, part_band_rows, set_band
from qwen_vl_classifier.training.run_folder import close_run, digest_of, open_run
from qwen_vl_classifier.training.sketch import SKETCH_BY, overlap, sketch
from qwen_vl_classifier.training.splitting import check_grouping, holdout, targets_of
from qwen_vl_classifier.training.starts import Reading, check_start, probe, rung_before, trainable_copy
from qwen_vl_classifier.training.step import TrainableClassifier
from qwen_vl_classifier.training.weighting import class_weights, example_weights

if TYPE_CHECKING:
    from qwen_vl_classifier.training.trainer import FinetuneTrainer

_SMALLEST_DIFFERENCE, _SMALLEST_SHARE = 1e-4, 0.01  # of two log losses: absolute, and as a share of the start's
_NOT_OF_THE_RESULT = ("micro_batch_size", "save_steps", "report_to")  # options that change how a run goes, not where


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What `finetune` reached.

    Attributes:
        classifier: The best state on the validation rows, calibrated; where that was not better than the start, the
            start.
        history: Each look at the validation rows, the first at the start: step, epoch, mean training loss since the
            one before (`None` for the start), validation log loss and accuracy. Those of the start are by its
            `predict_proba`; those of later states are before calibration. Those of the classifier itself are in its
            `training`, as `validation_log_loss` and `validation_accuracy`.
        improved: Whether the classifier's log loss on the validation rows, by its `predict_proba`, is below that of
            the start by its own.
        notes: What else there is to know, a sentence each.
    """

    classifier: Classifier
    history: list[dict[str, Any]]
    improved: bool
    notes: tuple[str, ...] = ()


def finetune(
    start: Classifier | Backbone,
    train_examples: Source,
    validation: Source | None = None,
    *,
    config: FinetuneConfig | None = None,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    out: str | os.PathLike[str] | None = None,
    store: FeatureStore | None = None,
    probing: TrainConfig | None = None,
    label_names: tuple[str, str] | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Train the model and its head together, from where a classifier stands.

    The state with the least validation log loss is calibrated on the same rows, and kept if its log loss there is then
    less than that of the start. Threshold, band and names of the classes are those that were asked for, or else those
    that the start has; where one cannot be had, a note says why. Under `torchrun` or `accelerate launch` all processes
    call this alike and get the same result.

    Args:
        start: Where to start; it is not changed. Of a backbone, the best probe is trained first.
        train_examples: Labelled examples of both classes, anything that `load_examples` takes.
        validation: Labelled examples of both classes that choose the best state; `None` holds out a share of the
            training rows, whole in pictures and groups. If the start has seen some of these, its head is trained
            again without them, so that it can be compared.
        config: Options.
        run: Folder for checkpoints, the course of the run and a page of changed pictures; `None` keeps none of it.
        resume: Go on with the run that the folder holds, with the same result as if it had not been interrupted.
        out: Folder in which to save the classifier before the run's checkpoints are removed, so that no moment is left
            at which an interruption loses what was trained; `None` saves nothing.
        store: Where features of the start are kept, if anywhere.
        probing: How the probe is trained where `start` is a backbone: taps, heads, words for yes and no. Objective,
            error rate, weights of rows and seed are those of `config`.
        label_names: What class 0 and class 1 are called; `None` takes the names that the start has, or where it has
            none the words that the data has.
        progress: Show a progress line.

    Raises:
        DataError: Missing labels, one class only, or too few examples.
        ConfigError: Options that do not go together, or a folder that holds another run.
        TrainingError: Loss, gradient or validation logits are not finite, and the message names the rows; or too few
            rows for the error rate that was asked for.
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
    check_start(start, config)
    before = start if isinstance(start, Classifier) else None
    names = label_names or (before.label_names if before else None)
    given = as_examples(train_examples, class_names=names, soft_labels=True)
    chosen = None if validation is None else as_examples(validation, class_names=names, soft_labels=True)
    targets_of(given, what="training")
    check_grouping(given, config.group_by)
    if names is None or (label_names is None and names == PLAIN_NAMES):
        words = class_names_of(given)
        label_names = None if words == PLAIN_NAMES else words
    answers = Answers.of(before, config, label_names)
    notes = [*config.unused(), *_changes(start, config, answers)]
    used: Sequence[Example] = given
    if chosen is None:
        parts = holdout(given, config.validation_share, config.seed, soft=True, by=config.group_by)
        used, chosen = ([given[row] for row in part] for part in parts)
    elif overlap(sketch(given), chosen):
        notes.append("some of the validation rows are training rows, which flatters what is trained; give other rows")
    used, band_rows = part_band_rows(used, answers, config, notes)
    rows, held_out = (_rows(part, what, config) for part, what in ((used, "training"), (chosen, "validation")))
    reading = Reading(probing or TrainConfig(focal_gamma=config.focal_gamma), store, progress)
    with ExitStack() as stack:
        stack.enter_context(_own_randomness())
        folder = Path(run) if run is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        is_main, checkpoint = _open_together(folder, start, rows, held_out, config, answers, resume=resume)
        rung = rung_before(start, used, [*chosen, *band_rows], config, notes, reading)
        baseline = Measure.of(rung, held_out, store=store)
        classifier = trainable_copy(rung, config)
        augmentation = Augmentation(config.augment, flips=config.flips)
        if run is not None and config.augment != "none" and is_main:
            write_augmentation_page(rows.examples, augmentation, folder / "augmentation.html", seed=config.seed)
        trainer = _trainer(classifier, rows, held_out, augmentation, config, folder, keep=run is not None)
        looks = trainer.run(checkpoint, progress=progress)
        improved = min(looks, key=lambda look: look["validation_log_loss"])["step"] > 0
        if improved:
            if _world_size() > 1:  # what was trained may be shared out among the processes
                classifier = trainable_copy(rung, config)
            load_best(classifier, folder)
        trainer.accelerator.wait_for_everyone()  # all have read the best weights
    history = [_start_entry(looks[0], baseline, notes), *looks[1:]]
    if improved:
        _freeze(classifier, rung if before is None else before, config)
        classifier.training = {
            "method": config.method,
            "training_rows": len(rows),
            "validation_rows": len(held_out),
            "options": asdict(config),
            "history": history,
            "rows_sketch": sketch([*used, *chosen]),
            "rows_sketch_by": SKETCH_BY,
            "start": (before or rung).training,
        }
        improved = finish(classifier, held_out, baseline, answers, notes, seed=config.seed)
    if improved:
        reached = classifier
        reached.label_names = answers.label_names
        if band_rows:
            set_band(reached, band_rows, answers.max_error)
        reached.training["notes"] = list(notes)
    elif before is not None:
        reached = keep_start(before, baseline, held_out, band_rows, answers, notes)
    elif given is used:
        reached = keep_start(rung, baseline, held_out, band_rows, answers, notes)
    else:
        notes.append("the probe is trained again, on all rows")
        reached = _probe_of_all(rung.backbone, given, config, answers, notes, reading)
    if out is not None and is_main:
        reached.save(out)
    if run is not None and is_main:
        close_run(folder)
    return FinetuneResult(reached, history, improved=improved, notes=tuple(notes))


def _changes(start: Classifier | Backbone, config: FinetuneConfig, answers: Answers) -> list[str]:
    """Say what the result will have otherwise than the start without being asked for it."""
    notes = []
    backbone = start if isinstance(start, Backbone) else start.backbone
    if backbone.quantization and config.method != "qlora":
        notes.append(
            f"the start is quantised to {backbone.quantization}, but {spelled('method', config.method)} trains and "
            f"saves whole weights; {spelled('method', 'qlora')} trains adapters on 4-bit weights"
        )
    if (
        isinstance(start, Classifier)
        and start.abstention
        and not answers.max_error
        and "max_error" not in answers.asked
    ):
        notes.append(
            "the start abstains, and its record does not say for which error rate; what is trained never abstains: "
            f"give {spelled('max_error')}"
        )
    return notes


def _start_entry(look: dict[str, Any], baseline: Measure, notes: list[str]) -> dict[str, Any]:
    """Return the first entry of the history, of the start itself; what trains is a copy, which may differ."""
    copied, own = look["validation_log_loss"], baseline.log_loss
    if abs(copied - own) > max(_SMALLEST_DIFFERENCE, _SMALLEST_SHARE * own):
        notes.append(
            f"the start has log loss {own:.4f} on the validation rows; the copy that trains had {copied:.4f} before "
            "its first step: it is quantised, of another type or without the start's isotonic curve"
        )
    return look | {"validation_log_loss": own, "validation_accuracy": baseline.accuracy}


def _freeze(classifier: Classifier, begun: Classifier, config: FinetuneConfig) -> None:
    """Freeze what was trained, as it will be used."""
    classifier.backbone.model.requires_grad_(False).eval()
    classifier.head.requires_grad_(False).eval()
    if config.merge:
        merge_adapter(classifier.backbone)
    classifier.backbone.mark_changed()
    classifier.finetuned = begun.finetuned or classifier.backbone.changed


def _probe_of_all(
    backbone: Backbone,
    examples: Sequence[Example],
    config: FinetuneConfig,
    answers: Answers,
    notes: list[str],
    reading: Reading,
) -> Classifier:
    """Train the probe on all rows, to answer as was asked for, or else for accuracy."""
    wanted: dict[str, Any] = {"objective": answers.objective, "max_error": answers.max_error}
    try:
        reached = probe(backbone, examples, config, reading, **wanted)
    except TrainingError as error:
        notes.append(f"{error}; the threshold is that for accuracy")
        reached = probe(backbone, examples, config, reading, **wanted | {"objective": "accuracy"})
    reached.label_names = answers.label_names
    reached.training["notes"] = [*reached.training["notes"], *notes]
    return reached


def _rows(examples: Sequence[Example], what: str, config: FinetuneConfig) -> Rows:
    targets = targets_of(examples, what=what)
    weights = example_weights(examples, config.weight_column)
    weights = weights * class_weights(targets, weights, config.class_weight)
    return Rows(examples, targets.astype(np.float32), weights.astype(np.float32))


def _record(
    start: Classifier | Backbone, rows: Rows, validation: Rows, config: FinetuneConfig, answers: Answers
) -> dict[str, Any]:
    """Return all that decides what a run computes, as JSON has it: keys are texts."""
    backbone = start if isinstance(start, Backbone) else start.backbone
    begin: dict[str, Any] = {"backbone": backbone.fingerprint}
    if isinstance(start, Classifier):
        begin |= {"tap": str(start.tap), "head": {name: t.sum().item() for name, t in start.head.state_dict().items()}}
    record: dict[str, Any] = {
        "config": {name: value for name, value in asdict(config).items() if name not in _NOT_OF_THE_RESULT},
        "start": begin,
        "answers": {"objective": answers.objective, "max_error": answers.max_error},
        "training rows": digest_of(rows.examples),
        "validation rows": digest_of(validation.examples),
    }
    as_read: dict[str, Any] = json.loads(json.dumps(record))
    return as_read


def _world_size() -> int:
    """Return the number of processes, as launchers say it before any of them has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _open_together(
    folder: Path,
    start: Classifier | Backbone,
    rows: Rows,
    validation: Rows,
    config: FinetuneConfig,
    answers: Answers,
    *,
    resume: bool,
) -> tuple[bool, Path | None]:
    """Let the first of all processes open the run; return whether this is it, and the checkpoint to go on from."""
    record = _record(start, rows, validation, config, answers)
    if _world_size() == 1:
        return True, open_run(folder, record, resume=resume)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    backbone = start if isinstance(start, Backbone) else start.backbone
    processes = PartialState(cpu=backbone.device.type == "cpu")
    checkpoint = open_run(folder, record, resume=resume) if processes.is_main_process else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    return processes.is_main_process, checkpoint


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
