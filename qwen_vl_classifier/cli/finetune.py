"""`finetune`: train the whole model, starting from a saved classifier or from a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import (
    SOFT_LABELS_HELP,
    add_backbone_flags,
    add_class_names_flag,
    add_data_argument,
    add_data_flags,
    add_features_flag,
    add_overwrite_flag,
    add_skip_flag,
    load_backbone,
    loading_options,
    open_store,
    read_examples,
    show_left_out,
)
from qwen_vl_classifier.cli.shared.endings import features_line, next_commands, wrapped
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.errors import ConfigError, StoppedError

if TYPE_CHECKING:
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.training.finetuning.finetuning import FinetuneResult

_PROBE = ("taps", "heads", "exportable", "yes", "no")  # options of `train` that matter where no classifier is given
_SHOWN_STATES = 5  # beside the start and the best
_BACKBONE = ("revision", "dtype", "quantization", "min_pixels", "max_pixels", "chat_template")


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "finetune",
        help="train the backbone too, starting from a classifier; best on a GPU",
        description="Train the backbone too, starting from a saved classifier.",
        details="The best state on the validation rows is saved; if none is better than the start, the start is saved.",
        usage="%(prog)s DATA --out FOLDER [options]",
        example="qwen-vl-classifier finetune demo/data/train.csv --from mine --out tuned",
    )
    add_data_argument(parser)
    parser.add_flag(
        "--from",
        dest="start",
        type=Path,
        metavar="CLASSIFIER",
        help="saved classifier to start from (default: train one on --model first)",
    )
    parser.add_flag("--out", type=Path, required=True, metavar="FOLDER", help="folder for the new classifier")
    parser.add_flag("--validation", metavar="DATA", help="rows to choose on (default: a part of DATA)")
    parser.add_flag("--soft-labels", rare=True, action="store_true", help=SOFT_LABELS_HELP)
    parser.add_flag(
        "--run",
        rare=True,
        dest="run_folder",
        type=Path,
        metavar="FOLDER",
        help="folder for checkpoints and logs (default: the output folder's name with -run added)",
    )
    parser.add_flag("--resume", action="store_true", help="continue a run that was interrupted")
    add_class_names_flag(parser)
    add_backbone_flags(parser)
    add_features_flag(parser, rare=True)
    add_data_flags(parser, columns=False)
    add_skip_flag(parser)
    add_overwrite_flag(parser)
    add_flags(parser, FinetuneConfig, section="training")
    add_flags(
        parser, TrainConfig, section="the classifier to start from, if --from is not given", only=_PROBE, rare=True
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Fine-tune, save, and print the validation losses; a run stopped by a signal ends with status 0."""
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.training.finetuning.finetuning import finetune
    from qwen_vl_classifier.training.finetuning.resuming import check_folders

    out: Path = flags.out if flags.out.name not in ("", "..") else flags.out.resolve()
    folder = flags.run_folder or out.with_name(f"{out.name}-run")
    check_folders(folder, out, resume=flags.resume, overwrite=flags.overwrite, features=flags.features)
    config = from_flags(FinetuneConfig, flags)
    probing = TrainConfig(focal_gamma=config.focal_gamma, **{name: getattr(flags, name) for name in _PROBE})
    if flags.start:
        _refuse_flags_of_a_checkpoint(flags)
    names = flags.class_names or (read_manifest(flags.start).label_names if flags.start else None)
    reading: dict[str, Any] = {"require_labels": True, "soft_labels": flags.soft_labels, "class_names": names}
    reading["trained"] = [flags.start] if flags.start else []
    examples = read_examples(flags.data, flags, **reading)
    validation = read_examples(flags.validation, flags, **reading) if flags.validation else None
    _choose_gpu()
    if flags.start:
        start: Classifier | Backbone = Classifier.load(flags.start, **loading_options(flags))
    else:
        start = load_backbone(flags)
    try:
        result = finetune(
            start,
            examples,
            validation,
            config=config,
            run=folder,
            resume=flags.resume,
            out=out,
            store=open_store(flags),
            probing=probing,
            label_names=flags.class_names,
            progress=flags.progress,
        )
    except StoppedError as stopped:
        print(stopped)
        return 0
    if os.environ.get("RANK", "0") == "0":
        show_left_out(*result.left_out)
        _show(result)
        print(f"\nSaved: {out}", f"Logs of the run: {folder}", features_line(flags.features), sep="\n")
        print("", *next_commands(out, flags, start=flags.start), sep="\n")
    return 0


def _refuse_flags_of_a_checkpoint(flags: argparse.Namespace) -> None:
    """Refuse flags of loading and probing a checkpoint beside `--from`, whose classifier records them."""
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)} | {"dtype": "auto"}
    for name in (*_BACKBONE, *_PROBE):
        if getattr(flags, name) != defaults.get(name):
            raise ConfigError(
                f"{spelled(name, getattr(flags, name))} with --from: the classifier has its own; leave one of them out"
            )


def _show(result: FinetuneResult) -> None:
    """Print whether it helped, how the classifier answers, and how the validation loss went."""
    from qwen_vl_classifier.classifier.model_card import answer_facts
    from qwen_vl_classifier.training.probe.outcome import class_words, objective_words

    classifier, record = result.classifier, result.classifier.training
    facts = answer_facts(record)
    name = class_words(classifier.label_names)[1]
    print(
        *map(
            wrapped,
            (
                _verdict(result),
                f"The validation rows stand for {result.stands_for}.",
                f"Threshold: {name} from a probability of {classifier.threshold:.3f} on, "
                f"{objective_words(facts.pop('objective', 'accuracy'))}.",
                *(f"{fact.capitalize()}: {words}" for fact, words in facts.items()),
                *(f"Note: {note}" for note in result.notes),
            ),
        ),
        sep="\n",
    )
    print("", *_history_lines(result.history), sep="\n")
    if result.throughput is not None:
        print("", wrapped(f"Training: {result.throughput}"), sep="\n")


def _verdict(result: FinetuneResult) -> str:
    """Say which state was kept; whether it is better, only rows that did not choose it can show."""
    start, record = result.history[0], result.classifier.training
    if not result.improved:
        return (
            "Kept the start: no fine-tuned state was better on the validation rows, where the start has log loss "
            f"{start['validation_log_loss']:.4f} and accuracy {start['validation_accuracy']:.3f}."
        )
    return (
        f"Kept the fine-tuned state: log loss {record['validation_log_loss']:.4f} on the validation rows, from "
        f"{record['start_log_loss']:.4f} at the start; accuracy {record['validation_accuracy']:.3f}, from "
        f"{start['validation_accuracy']:.3f}. The state was chosen on these rows, which flatters it: compare it "
        "with the start on other rows."
    )


def _history_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay out the start, the best state and the last ones."""
    best = min(history, key=lambda row: row["validation_log_loss"])
    last = history[-_SHOWN_STATES:]
    shown = [row for row in history if row is history[0] or row is best or row in last]
    lines = [f"{'step':>6} {'epoch':>6} {'training loss':>14} {'validation log loss':>20} {'accuracy':>9}"]
    for row in shown:
        loss = "-" if row["training_loss"] is None else f"{row['training_loss']:.4f}"
        lines.append(
            f"{row['step']:>6} {row['epoch']:>6.2f} {loss:>14} {row['validation_log_loss']:>20.4f} "
            f"{row['validation_accuracy']:>9.4f}{'  best' if row is best else ''}"
        )
    if len(shown) < len(history):
        lines.append(f"and {len(history) - len(shown)} more in the log of the run")
    return lines


def _choose_gpu() -> None:
    """Give each process of a launcher a GPU of its own."""
    if "LOCAL_RANK" in os.environ:
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
