"""Stage 2 of the original recipe: train the model itself, from where the probe ended, and never to end up worse."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.checkpoint.quantisation import without_advice
from qwen_vl_classifier.backbone.devices import spelled_devices
from qwen_vl_classifier.classifier.artifact import MANIFEST
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.fields import without_effect
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.spelling import flags_in_use, spelled
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example, shared_text
from qwen_vl_classifier.data.labels import PLAIN_NAMES, class_names_of
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.picture_checks import check_pixels
from qwen_vl_classifier.data.targets import targets_of
from qwen_vl_classifier.errors import ArtifactError, ConfigError, QwenVLClassifierError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.room import check_room
from qwen_vl_classifier.training.finetuning.augmentation import Augmentation
from qwen_vl_classifier.training.finetuning.augmentation_page import write_augmentation_page
from qwen_vl_classifier.training.finetuning.final_classifier import (
    Answers,
    Measure,
    finish,
    freeze,
    keep_start,
    part_band_rows,
    set_band,
    start_entry,
)
from qwen_vl_classifier.training.finetuning.kept_tokens import KeptTokens
from qwen_vl_classifier.training.finetuning.optimizers import check_optimizer
from qwen_vl_classifier.training.finetuning.resuming import (
    BEST,
    VISION_TOKENS,
    bytes_of_run,
    check_folders,
    close_run,
    load_trained_weights,
)
from qwen_vl_classifier.training.finetuning.run_record import open_together, world_size
from qwen_vl_classifier.training.finetuning.starting_point import (
    Reading,
    changes_of,
    check_start,
    probe_of_all,
    rung_before,
    trainable_copy,
)
from qwen_vl_classifier.training.finetuning.step import PackedClassifier, TrainableClassifier
from qwen_vl_classifier.training.finetuning.throughput import Throughput
from qwen_vl_classifier.training.finetuning.training_batches import Collator, LabelledRows
from qwen_vl_classifier.training.overlap import Contents, Novelty, may_have_seen, row_hashes, sketch
from qwen_vl_classifier.training.splitting import check_grouping, holdout
from qwen_vl_classifier.training.weighting import row_weights

if TYPE_CHECKING:
    from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What `finetune` reached.

    Attributes:
        classifier: The best state on the validation rows, calibrated; where that was not better than the start, the
            start. Adapters lie over the start's own weights, which are in memory once: do not train those afterwards.
        history: Each look at the validation rows, the first at the start: step, epoch, mean training loss since the
            one before (`None` for the start), validation log loss and accuracy. Those of the start are by its
            `predict_proba`; those of later states are before calibration. Those of the classifier itself are in its
            `training`, as `validation_log_loss` and `validation_accuracy`.
        improved: Whether the classifier's log loss on the validation rows, by its `predict_proba`, is below that of
            the start by its own.
        notes: What else there is to know, a sentence each.
        left_out: LabelledRows that cannot be used, as `BadRows.to_json` describes them, of each data set that has such.
        stands_for: What is new in the validation rows, for which their figures stand: "new pictures, the same 12
            texts".
        throughput: How fast it trained, and the memory that it took; `None` where there was nothing left to train.
    """

    classifier: Classifier
    history: list[dict[str, Any]]
    improved: bool
    notes: tuple[str, ...] = ()
    left_out: tuple[dict[str, Any], ...] = ()
    stands_for: str = ""
    throughput: Throughput | None = None


def finetune(
    start: Classifier | Backbone | str | os.PathLike[str],
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
    """Train the model and its head together, starting from a classifier.

    The state with the least validation log loss is calibrated on the same rows, and kept if its log loss there is then
    less than that of the start. Threshold, band and names of the classes are those that were set, or else those that
    the start has; where one is out of reach, a note says why. Under `torchrun` or `accelerate launch` all processes
    call this alike and get the same result.

    Args:
        start: A classifier or a backbone, or the folder or name of one; it is not changed. Of a backbone, the best
            probe is trained first.
        train_examples: Labelled examples of both classes, anything that `load_examples` takes.
        validation: Labelled examples of both classes that choose the best state; `None` holds out a share of the
            training rows, whole in pictures and groups. If the start has seen some of these, its head is trained
            again without them, so that it can be compared.
        config: Options.
        run: Folder for checkpoints, logs and a page of augmented pictures; `None` keeps none of it.
        resume: Continue the run that the folder holds, with the same result as if it had not been interrupted.
        out: Folder in which to save the classifier before the run's checkpoints are removed, so that an interruption
            never loses what was trained; `None` saves nothing. It is looked at before training; if saving fails all the
            same, the run is kept, and resuming it saves without training.
        store: Where features of the start are kept, if anywhere.
        probing: How the probe is trained where `start` is a backbone: taps, heads, words for yes and no. Objective,
            error rate, weights of rows and seed are those of `config`.
        label_names: What class 0 and class 1 are called; `None` takes the names that the start has, or where it has
            none the words that the data has.
        progress: Show a progress line.

    Raises:
        DataError: Missing labels, one class only, or too few examples.
        ImageError: More pictures cannot be opened than `config.max_errors` allows; all are decoded before training, and
            the message lists the rows.
        ConfigError: Options that do not go together; a folder that holds another run, or with `resume` one that has
            ended; a folder that cannot be written, or a disk without room.
        ArtifactError: `out` holds something else, or the classifier cannot be saved.
        TrainingError: Loss, gradient or validation logits are not finite, and the message names the rows; or too few
            rows for the error rate that was set.
        StoppedError: SIGTERM arrived, and the run saved its state.
        OutOfMemoryError: A single example does not fit.
        MissingExtraError: The extra `finetune` is not installed.
    """
    config = config or FinetuneConfig()
    with without_advice():
        for module in ("accelerate", "peft"):
            require(module, extra="finetune")
    if run is None and world_size() > 1:
        raise ConfigError("several processes and no folder for the run: give run=, the same in all of them")
    start = _start_of(start)
    check_start(start, config)
    backbone = start if isinstance(start, Backbone) else start.backbone
    if len(backbone.devices) > 1 and world_size() > 1:
        raise ConfigError(
            f"device {spelled_devices(backbone.devices)!r} in several processes: one model over several GPUs trains "
            "in one process; start it without torchrun, or give each process one GPU (--device cuda)"
        )
    check_optimizer(config.optimizer, backbone.device)
    check_folders(run, out, resume=resume, features=None if store is None else store.folder)
    before = start if isinstance(start, Classifier) else None
    names = label_names or (before.label_names if before else None)
    loading: dict[str, Any] = {"class_names": names, "soft_labels": True, "max_errors": config.max_errors}
    given = as_examples(train_examples, **loading)
    chosen = None if validation is None else as_examples(validation, **loading)
    targets_of(given, what="training")
    check_grouping(given, config.group_by)
    if names is None or (label_names is None and names == PLAIN_NAMES):
        words = class_names_of(given)
        label_names = None if words == PLAIN_NAMES else words
    answers = Answers.of(before, config, label_names)
    notes = [*config.unused(), *changes_of(start, config, answers)]
    data = {"training rows": given} | ({} if chosen is None else {"validation rows": chosen})
    checked = check_pixels(data, config.max_errors, progress=progress)
    given, chosen = checked.examples["training rows"], checked.examples.get("validation rows")
    notes += checked.notes
    used: Sequence[Example] = given
    if chosen is None:
        parts = holdout(given, config.validation_share, config.seed, soft=True, by=config.group_by)
        used, chosen = ([given[row] for row in part] for part in parts)
    elif may_have_seen({"rows_sketch": sketch(row_hashes(given))}, chosen):
        notes.append(
            "some validation rows are also training rows, so results look better than they are; give other rows"
        )
    stands_for = str(Novelty.between(Contents.of(used), Contents.of(chosen)))
    if validation is not None and not answers.target_error_rate:
        notes += without_effect(config, "where validation rows are given", "validation_share")
    used, band_rows = part_band_rows(used, answers, config, notes)
    rows, held_out = (_rows(part, what, config) for part, what in ((used, "training"), (chosen, "validation")))
    reading = Reading(probing or TrainConfig(focal_gamma=config.focal_gamma), store, progress)
    # Trainer puts batches on the current GPU, which is to be the one that has the embeddings.
    with _own_randomness(), torch.accelerator.device_index(backbone.device.index), ExitStack() as temporary:
        if run is not None:
            folder = Path(run)
        else:
            folder = Path(tempfile.mkdtemp(prefix="finetune-"))
            temporary.callback(shutil.rmtree, folder, ignore_errors=True)
        is_main, checkpoint = open_together(folder, start, rows, held_out, config, answers, out, resume=resume)
        rung = rung_before(start, used, [*chosen, *band_rows], config, notes, reading)
        begun = rung if before is None else before
        baseline = Measure.of(rung, held_out, store=store)
        classifier = trainable_copy(rung, config)
        needs = _bytes_needed(classifier, begun, config, len(rows), folder, out)
        if checkpoint is None:
            check_room(needs, "fine-tuning")
        augmentation = Augmentation(config.augment, flips=config.flips)
        if run is not None and config.augment != "none" and is_main:
            write_augmentation_page(rows.examples, augmentation, folder / "augmentation.html", seed=config.seed)
        kept = None
        if config.augment == "none":
            kept = KeptTokens.of_run(
                classifier.backbone,
                rung.backbone.fingerprint,
                folder / VISION_TOKENS,
                most=int(config.keep_vision_tokens * 1e9),
                is_lasting=run is not None,
                reserve=sum(size for _, size in needs),
                processes=world_size(),
            )
        trainer = _trainer(classifier, rows, held_out, augmentation, config, folder, kept, keep=run is not None)
        looks = trainer.run(checkpoint, progress=progress)
        improved = min(looks, key=lambda look: look["validation_log_loss"])["step"] > 0
        if improved:
            if world_size() > 1:  # what was trained may be shared out among the processes
                classifier = trainable_copy(rung, config)
            load_trained_weights(
                TrainableClassifier(classifier.backbone, classifier.tap, classifier.head), folder / BEST
            )
        trainer.accelerator.wait_for_everyone()  # all have read the best weights
        throughput = trainer.throughput()
        del trainer, kept  # and with them what is kept of pictures
        history = [start_entry(looks[0], baseline, notes), *looks[1:]]
        if improved:
            freeze(classifier, begun, config)
            classifier.training = {
                "method": config.method,
                "training_rows": len(rows),
                "validation_rows": len(held_out),
                "group_by": config.group_by,
                "stands_for": stands_for,
                "options": asdict(config),
                "history": history,
                "rows_sketch": sketch(row_hashes([*used, *chosen])),
                "start": begun.training,
                **({"text": text} if (text := shared_text(used)) else {}),
                **({} if throughput is None else {"throughput": asdict(throughput)}),
            }
            improved = finish(classifier, held_out, baseline, answers, notes, config)
        if improved:
            reached = classifier
            reached.label_names = answers.label_names
            if band_rows:
                set_band(reached, band_rows, answers.target_error_rate)
            reached.training["notes"] = list(notes)
            reached.training |= {"left_out": checked.left_out} if checked.left_out else {}
        elif before is not None or given is used:
            reached = keep_start(begun, baseline, held_out, band_rows, answers, notes)
        else:
            notes.append("the probe is trained again, on all rows")
            reached = probe_of_all(rung.backbone, given, config, answers, notes, reading)
        if out is not None and is_main:
            _save(reached, Path(out), folder, temporary)
        if run is not None and is_main:
            close_run(folder, None if out is None else Path(out))
    return FinetuneResult(
        reached,
        history,
        improved=improved,
        notes=tuple(notes),
        left_out=tuple(checked.left_out),
        stands_for=stands_for,
        throughput=throughput,
    )


def _bytes_needed(
    classifier: Classifier,
    begun: Classifier,
    config: FinetuneConfig,
    rows: int,
    folder: Path,
    out: str | os.PathLike[str] | None,
) -> list[tuple[Path, int]]:
    """Return how many bytes checkpoints and result take, by their folders."""
    parameters = [*classifier.backbone.model.parameters(), *classifier.head.parameters()]
    trained, every = (
        sum(p.numel() * p.element_size() for p in parameters if p.requires_grad or frozen) for frozen in (False, True)
    )
    whole = config.method == "full" or config.merge or classifier.backbone.changed or begun.finetuned
    steps = math.ceil(rows / config.batch_size) * config.epochs
    needs = [(folder, bytes_of_run(trained, steps, config.save_steps))]
    if out is not None:
        needs.append((Path(out), every if whole else trained))
    return needs


def _save(classifier: Classifier, out: Path, folder: Path, temporary: ExitStack) -> None:
    """Save the result; if that fails, keep the run, from which it can be saved without training again."""
    try:
        classifier.save(out)
    except (QwenVLClassifierError, OSError, SafetensorError) as error:
        temporary.pop_all()
        again = f"with {spelled('resume', True)} and another {spelled('out')}"
        if not flags_in_use():
            again += f" and {spelled('run', str(folder))}"
        raise ArtifactError(
            f"{error}; what was trained is kept in {folder}: the same command {again} saves it without training"
        ) from error


def _rows(examples: Sequence[Example], what: str, config: FinetuneConfig) -> LabelledRows:
    targets = targets_of(examples, what=what)
    weights = row_weights(examples, targets, column=config.weight_column, class_weight=config.class_weight)
    return LabelledRows(examples, targets.astype(np.float32), weights.astype(np.float32))


def _trainer(
    classifier: Classifier,
    rows: LabelledRows,
    validation: LabelledRows,
    augmentation: Augmentation,
    config: FinetuneConfig,
    folder: Path,
    kept: KeptTokens | None,
    *,
    keep: bool,
) -> FinetuneTrainer:
    from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer  # an extra, and seconds

    report_to = [] if config.report_to == "none" else [config.report_to]
    if config.report_to == "auto":
        report_to = ["tensorboard"] if keep and importlib.util.find_spec("tensorboard") else []
    model = PackedClassifier(classifier.backbone, classifier.tap, classifier.head)
    collator = Collator(rows, classifier.backbone.processor, augmentation, config.seed)
    try:
        return FinetuneTrainer(model, rows, validation, collator, config, folder, report_to, kept)
    except (ValueError, RuntimeError) as error:
        if "is not supported" in str(error) or "requires" in str(error):  # the integrations' own words
            raise ConfigError(
                f"report_to {config.report_to!r}: {str(error).splitlines()[0]}; give auto, none or what is installed"
            ) from error
        raise


def _start_of(start: Classifier | Backbone | str | os.PathLike[str]) -> Classifier | Backbone:
    """Return the classifier or backbone that was given by its folder or name."""
    if isinstance(start, (Classifier, Backbone)):
        return start
    return Classifier.load(start) if (Path(start) / MANIFEST).is_file() else Backbone.load(start)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the caller's random numbers as they are: transformers seeds them all."""
    python, numpy_state = random.getstate(), np.random.get_state()  # the one that is seeded
    kind = torch.accelerator.current_accelerator(check_available=True)
    devices = range(torch.accelerator.device_count() if kind else 0)
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind.type if kind else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
