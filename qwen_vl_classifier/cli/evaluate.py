"""`evaluate`: how good a saved classifier is on labelled data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_vl_classifier.cli.options import (
    add_data_flags,
    add_device_flag,
    add_features_flag,
    open_store,
    read_examples,
)


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "evaluate",
        help="measure a classifier on labelled data",
        description="Measure a saved classifier on labelled data it was not trained on.",
    )
    parser.add_argument("classifier", metavar="CLASSIFIER", help="folder of a saved classifier")
    parser.add_argument("data", metavar="DATA", help="JSONL, CSV or Parquet file, or a folder with 0/ and 1/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.json and report.html here")
    add_features_flag(parser)
    add_device_flag(parser)
    add_data_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Evaluate and print a table; write the report where asked."""
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.evaluation.evaluate import evaluate
    from qwen_vl_classifier.evaluation.metrics import metrics_table
    from qwen_vl_classifier.evaluation.report import write_report

    examples = read_examples(flags.data, flags, require_labels=True)
    classifier = Classifier.load(flags.classifier, device=flags.device)
    evaluation = evaluate(classifier, examples, store=open_store(flags), progress=True)
    print(metrics_table(evaluation["metrics"]))
    if flags.out:
        print(f"report     {write_report(evaluation, flags.out)}")
    return 0
