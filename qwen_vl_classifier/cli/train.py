"""`train`: train a classifier, or a panel of several labels, on a data set and save it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import (
    SOFT_LABELS_HELP,
    add_backbone_flags,
    add_class_names_flag,
    add_data_argument,
    add_data_flags,
    add_features_flag,
    add_labels_flags,
    add_overwrite_flag,
    add_skip_flag,
    check_labels_flags,
    load_backbone,
    open_store,
    read_examples,
    show_left_out,
)
from qwen_vl_classifier.cli.shared.endings import features_line, next_commands
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.files.room import check_apart, check_writable


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "train",
        help="train a classifier on labelled rows; the backbone stays as it is",
        description="Train a classifier on labelled rows, on top of a backbone that stays as it is.",
        details="The backbone reads each row once. Heads are trained on its features and compared by cross-validation, "
        "and the best one is saved.",
        usage="%(prog)s DATA --out FOLDER [options]",
        example="qwen-vl-classifier train demo/data/train.csv --positive matching --out mine",
    )
    add_data_argument(parser)
    parser.add_flag("--out", type=Path, required=True, metavar="FOLDER", help="folder for the new classifier")
    parser.add_flag(
        "--validation",
        metavar="DATA",
        help="rows to measure it on (default: cross-validation)",
    )
    parser.add_flag("--soft-labels", rare=True, action="store_true", help=SOFT_LABELS_HELP)
    add_class_names_flag(parser)
    add_backbone_flags(parser)
    add_features_flag(parser)
    add_data_flags(parser)
    add_labels_flags(parser)
    add_skip_flag(parser)
    add_overwrite_flag(parser)
    add_flags(parser, TrainConfig, section="training")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Train, save, and say what was tried, what was kept and how good it will be."""
    from qwen_vl_classifier.classifier.artifact import check_replaceable

    several = flags.labels is not None or flags.one_of
    if several:
        check_labels_flags(flags)
    check_apart(flags.out, features=flags.features)
    check_replaceable(flags.out, overwrite=flags.overwrite, panel=several)
    check_writable(flags.out, replaced=True)
    config = from_flags(TrainConfig, flags)
    training = _train_panel(flags, config) if several else _train(flags, config)
    show_left_out(*training.get("left_out", []))
    print(f"\nSaved: {flags.out}", features_line(flags.features), sep="\n")
    print("", *next_commands(flags.out, flags, data=flags.validation), sep="\n")
    return 0


def _train(flags: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """Train a classifier of one label, save it and print the result; return the record of its training."""
    from qwen_vl_classifier.training.probe.probe import train

    names = flags.class_names
    examples = read_examples(flags.data, flags, require_labels=True, soft_labels=flags.soft_labels, class_names=names)
    validation = None
    if flags.validation:
        validation = read_examples(flags.validation, flags, require_labels=True, class_names=names)
    result = train(
        examples,
        validation,
        backbone=load_backbone(flags),
        config=config,
        store=open_store(flags),
        label_names=names,
        progress=flags.progress,
    )
    result.classifier.save(flags.out)
    print(result)
    return result.classifier.training


def _train_panel(flags: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """Train a classifier for each of several labels, as `_train`."""
    from qwen_vl_classifier.training.probe.panel_training import train_panel

    in_words = flags.labels is None
    examples, validation = (
        read_examples(data, flags, require_labels=in_words, read_labels=False, one_of=in_words) if data else None
        for data in (flags.data, flags.validation)
    )
    assert examples is not None
    result = train_panel(
        examples,
        validation,
        labels=flags.labels,
        one_of=flags.one_of,
        backbone=load_backbone(flags),
        config=config,
        store=open_store(flags),
        label_column=flags.label_column,
        progress=flags.progress,
    )
    result.panel.save(flags.out)
    print(result)
    return result.panel.training
