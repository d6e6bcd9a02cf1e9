"""`export`: a saved classifier in, a folder that another engine serves out."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import add_loading_flags, loading_options
from qwen_vl_classifier.config.export import ExportConfig


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "export",
        help="write a classifier for another engine, such as vLLM",
        description=(
            "Write a classifier as a folder that another engine loads, with the same probabilities. What no engine "
            "applies is refused, or left to the client."
        ),
        usage="%(prog)s CLASSIFIER --out DIR [options]",
    )
    parser.add_argument("classifier", metavar="CLASSIFIER", help="folder of a saved classifier")
    parser.add_flag("--out", type=Path, required=True, metavar="DIR", help="new folder for what the engine loads")
    add_flags(parser, ExportConfig)
    add_loading_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Export, and say how to serve it."""
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.exporting.export import check_out, export
    from qwen_vl_classifier.exporting.export_manifest import read_export

    config = from_flags(ExportConfig, flags)
    check_out(flags.out)
    classifier = Classifier.load(flags.classifier, **loading_options(flags))
    folder = export(classifier, flags.out, **dataclasses.asdict(config))
    print(f"exported {folder}")
    for command in read_export(folder).serve:
        print(command.replace("FOLDER", str(folder)))
    return 0
