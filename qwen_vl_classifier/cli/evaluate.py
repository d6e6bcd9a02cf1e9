"""`evaluate`: how good a saved classifier is on labelled data, or which of two is better."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import (
    add_data_flags,
    add_features_flag,
    add_loading_flags,
    loading_options,
    open_store,
    read_examples,
    show_left_out,
)
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.whole import write_file

_USAGE = """qwen-vl-classifier evaluate CLASSIFIER DATA [options]
       qwen-vl-classifier evaluate A B DATA [options]
       qwen-vl-classifier evaluate A B --data DATA [options]"""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "evaluate",
        help="measure a classifier on labelled data, or compare two",
        description="Measure a saved classifier on labelled data it was not trained on, with 95 % intervals and "
        "baselines, and check that it looks at the picture and reads the text. Given two classifiers, compare them on "
        "the same rows instead.",
        usage=_USAGE,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folders of one or two saved classifiers, then the data: JSONL, JSON, CSV, TSV or Parquet file, or a "
        "folder with a subfolder for each class",
    )
    parser.add_flag("--data", metavar="DATA", help="the data, where it is not the last PATH")
    parser.add_flag(
        "--out", type=Path, metavar="DIR", help="write the report here; with two classifiers, their comparison as JSON"
    )
    parser.add_flag(
        "--train", metavar="FILE", help="the training data, to report rows and pictures that DATA shares with it"
    )
    add_features_flag(parser)
    add_loading_flags(parser)
    add_data_flags(parser)
    add_flags(parser, EvaluateConfig, section="evaluation")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Evaluate or compare, print a table and write the report where asked."""
    config = from_flags(EvaluateConfig, flags)
    folders = [*flags.paths]
    data = flags.data or (folders.pop() if len(folders) > 1 else None)
    if data is None:
        raise ConfigError(f"only {flags.paths[0]!r}: give a saved classifier, or two, and then the data")
    if len(folders) > 2:
        raise ConfigError(f"{len(folders)} classifiers: give one to evaluate or two to compare")
    if len(folders) == 2:
        return _compare(folders[0], folders[1], data, config, flags)
    return _evaluate(folders[0], data, config, flags)


def _evaluate(folder: str, data: str, config: EvaluateConfig, flags: argparse.Namespace) -> int:
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.evaluation.evaluation import evaluate
    from qwen_vl_classifier.evaluation.report import write_report
    from qwen_vl_classifier.evaluation.terminal import evaluation_table

    names = read_manifest(folder).label_names
    examples = read_examples(data, flags, require_labels=True, class_names=names)
    training = None
    if flags.train:
        whole = argparse.Namespace(**vars(flags) | {"limit": None})  # --limit is about what is measured
        training = read_examples(
            flags.train, whole, require_labels=True, soft_labels=not flags.positive, class_names=names
        )
    classifier = Classifier.load(folder, **loading_options(flags))
    evaluation = evaluate(
        classifier, examples, config=config, training=training, store=open_store(flags), progress=True
    )
    report = write_report(evaluation, flags.out, examples=examples) if flags.out else None
    if "left_out" in evaluation:
        show_left_out(evaluation["left_out"])
    print(evaluation_table(evaluation))
    if report:
        print(f"\nreport  {report}")
    return 0


def _compare(a: str, b: str, data: str, config: EvaluateConfig, flags: argparse.Namespace) -> int:
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.evaluation.compare import compare
    from qwen_vl_classifier.evaluation.terminal import comparison_table

    examples = read_examples(data, flags, require_labels=True, class_names=read_manifest(a).label_names)
    sides = [Classifier.load(folder, **loading_options(flags)) for folder in (a, b)]
    comparison = compare(
        sides[0], sides[1], examples, names=(a, b), config=config, store=open_store(flags), progress=True
    )
    if "left_out" in comparison:
        show_left_out(comparison["left_out"])
    path: Path | None = None
    if flags.out:
        path = flags.out / "comparison.json"
        try:
            flags.out.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(comparison, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); give a folder that can be") from error
    print(comparison_table(comparison))
    if path:
        print(f"\ncomparison  {path}")
    return 0
