"""`evaluate`: measure a saved classifier on labelled data, or compare several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_classifier.classifier.panel_folder import is_panel, read_panel
from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import (
    add_data_flags,
    add_features_flag,
    add_loading_flags,
    add_skip_flag,
    loading_options,
    open_store,
    read_examples,
    show_left_out,
)
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import ConfigError

if TYPE_CHECKING:
    from qwen_vl_classifier.classifier.classifier import Classifier

_USAGE = """%(prog)s CLASSIFIER ... DATA [options]
       %(prog)s CLASSIFIER ... --data DATA [options]"""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "evaluate",
        help="measure a classifier on labelled data, or compare several",
        description="Measure a saved classifier or panel on labelled rows that it was not trained on, and check that "
        "it uses picture and text. Given several classifiers, compare them on the same rows.",
        usage=_USAGE,
        example="qwen-vl-classifier evaluate demo/classifier demo/data/test.csv --out report",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folders of one or more saved classifiers, or of one panel; then labelled rows: a CSV, TSV, JSON, JSONL "
        "or Parquet file, or a folder with a subfolder for each class",
    )
    parser.add_flag("--data", metavar="DATA", help="the labelled rows, if they are not the last PATH")
    parser.add_flag(
        "--out", type=Path, metavar="FOLDER", help="write a report, or a comparison of several, to this folder"
    )
    parser.add_flag("--train", metavar="DATA", help="the training rows, to report what the data shares with them")
    add_features_flag(parser, rare=True)
    add_loading_flags(parser)
    add_data_flags(parser)
    add_skip_flag(parser)
    add_flags(parser, EvaluateConfig, section="evaluation")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Evaluate or compare, print a table and write the report where asked."""
    config = from_flags(EvaluateConfig, flags)
    folders = [*flags.paths]
    data = flags.data or (folders.pop() if len(folders) > 1 else None)
    if data is None:
        raise ConfigError(f"only {flags.paths[0]!r}; expected one or more saved classifiers, then the data")
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise ConfigError(f"{twice!r} is given twice; expected different classifiers, then the data")
    panel = next((folder for folder in folders if is_panel(folder)), None)
    if panel is not None and len(folders) > 1:
        raise ConfigError(
            f"{panel!r} is a panel, and {len(folders)} folders were given; expected one panel, or classifiers to "
            "compare; evaluate a panel by itself"
        )
    if len(folders) > 1:
        return _compare(folders, data, config, flags)
    return (_evaluate if panel is None else _evaluate_panel)(folders[0], data, config, flags)


def _evaluate(folder: str, data: str, config: EvaluateConfig, flags: argparse.Namespace) -> int:
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.evaluation.evaluation import evaluate
    from qwen_vl_classifier.evaluation.report import write_report
    from qwen_vl_classifier.evaluation.terminal import evaluation_table

    names = read_manifest(folder).label_names
    examples = read_examples(data, flags, require_labels=True, class_names=names, trained=[folder])
    training = None
    if flags.train:
        whole = argparse.Namespace(**vars(flags) | {"limit": None})  # --limit is about what is measured
        training = read_examples(
            flags.train,
            whole,
            require_labels=True,
            soft_labels=not flags.positive,
            class_names=names,
            trained=[folder],
        )
    classifier = Classifier.load(folder, **loading_options(flags))
    evaluation = evaluate(
        classifier, examples, config=config, training=training, store=open_store(flags), progress=flags.progress
    )
    evaluation["measured"] |= {"classifier": folder, "data": data}
    report = write_report(evaluation, flags.out, examples=examples) if flags.out else None
    if "left_out" in evaluation:
        show_left_out(evaluation["left_out"])
    print(evaluation_table(evaluation))
    if report:
        print(f"\nreport  {report}")
    return 0


def _evaluate_panel(folder: str, data: str, config: EvaluateConfig, flags: argparse.Namespace) -> int:
    from qwen_vl_classifier.classifier.panel import Panel
    from qwen_vl_classifier.evaluation.panels.panel_evaluation import evaluate_panel
    from qwen_vl_classifier.evaluation.panels.panel_terminal import panel_table
    from qwen_vl_classifier.evaluation.report import write_report

    for flag, why in (("train", "look for training rows"), ("positive", "say which word counts as 1")):
        if getattr(flags, flag) is not None:
            raise ConfigError(
                f"--{flag} with the panel {folder!r}; it is for one classifier, to {why}; leave it out, or evaluate "
                "the classifier of one label"
            )
    one_of = read_panel(folder).one_of
    examples = read_examples(data, flags, require_labels=False, read_labels=False, one_of=one_of, trained=[folder])
    panel = Panel.load(folder, **loading_options(flags))
    evaluation = evaluate_panel(
        panel,
        examples,
        config=config,
        label_column=flags.label_column,
        store=open_store(flags),
        progress=flags.progress,
    )
    evaluation["measured"] |= {"panel": folder, "data": data}
    report = write_report(evaluation, flags.out, examples=examples) if flags.out else None
    if "left_out" in evaluation:
        show_left_out(evaluation["left_out"])
    print(panel_table(evaluation))
    if report:
        print(f"\nreport  {report}")
    return 0


def _compare(folders: Sequence[str], data: str, config: EvaluateConfig, flags: argparse.Namespace) -> int:
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.evaluation.compare import compare
    from qwen_vl_classifier.evaluation.report import write_comparison
    from qwen_vl_classifier.evaluation.terminal import comparison_table

    named = [read_manifest(folder).label_names for folder in folders]
    words = next((names for names in named if names != ("0", "1")), named[0])
    examples = read_examples(data, flags, require_labels=True, class_names=words, trained=folders)
    comparison = compare(
        _load_all(folders, flags),
        examples,
        names=_short_names(folders),
        config=config,
        store=open_store(flags),
        progress=flags.progress,
    )
    comparison["measured"]["data"] = data
    for classifier, folder in zip(comparison["classifiers"], folders, strict=True):
        classifier["folder"] = folder
    if "left_out" in comparison:
        show_left_out(comparison["left_out"])
    page = write_comparison(comparison, flags.out, examples=examples) if flags.out else None
    print(comparison_table(comparison))
    if page:
        print(f"\ncomparison  {page}")
    return 0


def _load_all(folders: Sequence[str], flags: argparse.Namespace) -> list[Classifier]:
    """Load classifiers in their order, each backbone once."""
    from qwen_vl_classifier.classifier.artifact import read_manifest
    from qwen_vl_classifier.classifier.panel import Panel

    shared: dict[str, list[str]] = {}
    for folder in folders:
        shared.setdefault(read_manifest(folder).backbone["fingerprint"], []).append(folder)
    loaded: dict[str, Classifier] = {}
    for group in shared.values():
        loaded |= zip(group, Panel.load(group, **loading_options(flags)).classifiers, strict=True)
    return [loaded[folder] for folder in folders]


def _short_names(folders: Sequence[str]) -> list[str]:
    """Call classifiers by the last part of their paths, where that tells them apart."""
    last = [Path(folder).resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [*folders]
