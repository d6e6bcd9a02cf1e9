"""`threshold`: save a copy of a classifier with another threshold."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.options import (
    add_data_flags,
    add_features_flag,
    add_loading_flags,
    add_overwrite_flag,
    loading_options,
    open_store,
    read_examples,
)
from qwen_vl_classifier.errors import ConfigError, one_line
from qwen_vl_classifier.objectives import OBJECTIVES

if TYPE_CHECKING:
    from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities

_USAGE = """%(prog)s CLASSIFIER --set PROBABILITY --out FOLDER
       %(prog)s CLASSIFIER DATA --objective ... --out FOLDER"""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "threshold",
        help="save a classifier with another threshold",
        description="Save a copy of a classifier with another threshold: the probability of class 1 from which the "
        "answer is yes. Probabilities stay the same. The copy never abstains.",
        usage=_USAGE,
        example="qwen-vl-classifier threshold demo/classifier --set 0.9 --out strict",
    )
    parser.add_argument("classifier", metavar="CLASSIFIER", help="folder of a saved classifier")
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="labelled rows that the classifier was not trained on, to choose the threshold on or to see its effect",
    )
    parser.add_flag("--out", type=Path, required=True, metavar="FOLDER", help="folder for the new classifier")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--set", type=float, metavar="PROBABILITY", help="the threshold, from 0 to 1")
    choice.add_argument("--objective", metavar="OBJECTIVE", help=f"what it optimises: {OBJECTIVES}")
    add_overwrite_flag(parser)
    add_features_flag(parser, rare=True)
    add_loading_flags(parser)
    add_data_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Save the copy; with data, print what the new threshold changes."""
    from qwen_vl_classifier.classifier.artifact import check_replaceable, read_manifest
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel_folder import read_panel
    from qwen_vl_classifier.classifier.rethresholding import (
        checked_threshold,
        copy_at_threshold,
        panel_around,
        renew_panel_card,
    )
    from qwen_vl_classifier.classifier.thresholds import choose_threshold
    from qwen_vl_classifier.data.targets import labels_of
    from qwen_vl_classifier.objectives import Objective

    if flags.objective is not None:
        Objective.parse(flags.objective)
        if flags.data is None:
            raise ConfigError("--objective without DATA; give labelled rows on which to choose the threshold")
    else:
        checked_threshold(flags.set)
    check_replaceable(flags.out, overwrite=flags.overwrite)
    before = read_manifest(flags.classifier)
    panel = panel_around(flags.out)
    if panel is not None and flags.out.resolve() != Path(flags.classifier).resolve():
        raise ConfigError(
            f"--out {flags.out}: is the folder of another label of the panel {panel}, which would be lost; give "
            f"--out {flags.classifier} to change that label itself, or a new folder"
        )
    if flags.data is None:
        copy_at_threshold(flags.classifier, flags.out, flags.set)
        threshold = flags.set
    else:
        names = before.label_names
        examples = read_examples(flags.data, flags, require_labels=True, class_names=names, trained=[flags.classifier])
        labels = labels_of(examples, what="threshold", both=False)
        classifier = Classifier.load(flags.classifier, **loading_options(flags))
        probability = classifier.predict_proba(examples, store=open_store(flags), progress=flags.progress)[:, 1]
        threshold = flags.set if flags.objective is None else choose_threshold(probability, labels, flags.objective)
        print(_effect(labels, probability, (before.threshold, threshold), before.label_names))
        if flags.objective is not None:
            print("these rows chose the threshold; evaluate the copy on other rows to see what it reaches on new ones")
        classifier.with_threshold(threshold, objective=flags.objective).save(flags.out)
    if before.abstention is not None:
        print("the copy never abstains: the abstention band belonged to the old threshold")
    print(f"threshold   {threshold:.4g} (before: {before.threshold:.4g})")
    print(f"classifier  {flags.out}")
    if panel is not None:
        renew_panel_card(panel)
        note = "; its choice of a class depends on no threshold" if read_panel(panel).one_of else ""
        print(f"panel       {panel} uses it from now on{note}")
    if flags.data is None:
        print(f"next        qwen-vl-classifier evaluate {shlex.quote(str(flags.out))} DATA")
    return 0


def _effect(labels: Labels, probability: Probabilities, thresholds: tuple[float, float], names: tuple[str, str]) -> str:
    """Return a table of what answers are worth at the threshold before and at the new one."""
    from qwen_vl_classifier.evaluation.metrics import compute_metrics, rounded

    no, yes = (f"class {number}" if name == str(number) else one_line(name) for number, name in enumerate(names))
    rows = {
        "accuracy": "accuracy",
        f"recall of {yes}": "recall_1",
        f"precision of {yes}": "precision_1",
        f"recall of {no}": "recall_0",
        f"precision of {no}": "precision_0",
    }
    sides = [compute_metrics(labels, probability, threshold) for threshold in thresholds]
    width = max(map(len, rows))
    lines = [f"{f'on {len(labels):,} rows':<{width}}  {'before':>8}  {'new':>8}"]
    lines += [
        f"{title:<{width}}  {rounded(sides[0][name]):>8}  {rounded(sides[1][name]):>8}" for title, name in rows.items()
    ]
    counts = [f"{int((probability >= threshold).sum()):,}" for threshold in thresholds]
    return "\n".join([*lines, f"{f'answers {yes}':<{width}}  {counts[0]:>8}  {counts[1]:>8}"])
