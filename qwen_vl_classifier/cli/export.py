"""`export`: write a saved classifier as a folder for another engine."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import add_loading_flags, loading_options
from qwen_vl_classifier.config.export import CheckConfig, ExportConfig
from qwen_vl_classifier.errors import ConfigError


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "export",
        help="write a classifier for another engine, such as vLLM",
        description="Write a classifier as a folder for another engine, which gives the same probabilities; or check "
        "that a running server gives them.",
        usage="%(prog)s CLASSIFIER --out FOLDER [options]\n       %(prog)s FOLDER --check URL [options]",
        example="qwen-vl-classifier export my-classifier --to vllm --out for-vllm",
    )
    parser.add_argument(
        "classifier", metavar="CLASSIFIER", help="folder of a saved classifier; with --check, an exported folder"
    )
    parser.add_flag("--out", type=Path, metavar="FOLDER", help="new folder for the engine")
    add_flags(parser, ExportConfig)
    add_flags(parser, CheckConfig, section="checking a server")
    add_loading_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Export and say how to use it, or check a server."""
    if bool(flags.check) == (flags.out is not None):
        raise ConfigError("give either --out DIR to export, or --check URL to check a server of an exported folder")
    if flags.check:
        return _check(flags.classifier, from_flags(CheckConfig, flags))
    return _export(flags)


def _export(flags: argparse.Namespace) -> int:
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.exporting.export_manifest import read_export
    from qwen_vl_classifier.exporting.exported_folder import check_out, export

    config = from_flags(ExportConfig, flags)
    check_out(flags.out)
    classifier = Classifier.load(flags.classifier, **loading_options(flags))
    folder = export(classifier, flags.out, **dataclasses.asdict(config))
    print(f"exported {folder}")
    manifest = read_export(folder)
    for command in manifest.serve or manifest.ask:  # nothing serves what a library loads
        print(command.replace("FOLDER", shlex.quote(str(folder))))
    return 0


def _check(folder: str, config: CheckConfig) -> int:
    from qwen_vl_classifier.exporting.checking import check_server

    comparisons = check_server(
        folder,
        config.check,
        served_model_name=config.served_model_name,
        api_key_file=config.api_key_file,
        tolerance=config.tolerance,
        answer_timeout=config.answer_timeout,
    )
    largest = {
        resized: max((item.difference for item in comparisons if item.example.resized is resized), default=0.0)
        for resized in (False, True)
    }
    print(
        f"{len(comparisons)} of {len(comparisons)} reference examples agree; largest difference {largest[False]:.1e}"
        f", with a resized picture {largest[True]:.1e}"
    )
    return 0
