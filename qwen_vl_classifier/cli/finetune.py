"""`finetune`: train the whole model, starting from a saved classifier."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_vl_classifier.cli.options import add_data_flags, add_device_flag, read_examples
from qwen_vl_classifier.config import FinetuneConfig, add_flags, from_flags


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "finetune",
        help="train the whole model, starting from a classifier",
        description="Train backbone and head together, starting where the classifier ended.",
    )
    parser.add_argument("data", metavar="DATA", help="JSONL, CSV or Parquet file, or a folder with 0/ and 1/")
    parser.add_argument(
        "--from", dest="start", type=Path, required=True, metavar="CLASSIFIER", help="classifier to start from"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the new classifier")
    parser.add_argument("--validation", metavar="FILE", help="data to choose on (default: a share of DATA)")
    add_device_flag(parser)
    add_data_flags(parser)
    add_flags(parser.add_argument_group("training"), FinetuneConfig)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Fine-tune, save, and show the course of the validation loss."""
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.training.finetune import finetune

    config = from_flags(FinetuneConfig, flags)
    examples = read_examples(flags.data, flags, require_labels=True)
    validation = read_examples(flags.validation, flags, require_labels=True) if flags.validation else None
    result = finetune(Classifier.load(flags.start, device=flags.device), examples, validation, config=config)
    print(f"{'epoch':>5} {'training loss':>14} {'validation log loss':>20}")
    for row in result.history:
        loss = "-" if row["training_loss"] is None else f"{row['training_loss']:.4f}"
        print(f"{row['epoch']:>5} {loss:>14} {row['validation_log_loss']:>20.4f}")
    if not result.improved:
        print("\nno epoch was better than the start on the validation rows: the start is kept")
    result.classifier.save(flags.out)
    print(f"saved {flags.out}")
    return 0
