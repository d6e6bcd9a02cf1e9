"""`demo`: the whole job on synthetic pictures, from data to predictions, in less than a minute."""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.options import add_device_flag, add_overwrite_flag
from qwen_vl_classifier.cli.shared.endings import command_line
from qwen_vl_classifier.config.evaluate import EvaluateConfig

if TYPE_CHECKING:
    from qwen_vl_classifier.scenes.colour_match import Task

_WIDTH = 80


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "demo",
        help="try everything on synthetic pictures, offline, in a minute or two",
        description="Make synthetic pictures, train a classifier on them, evaluate it, save it, load it and predict: "
        "offline, with the built-in backbone.",
        usage="%(prog)s [options]",
        example="qwen-vl-classifier demo",
    )
    parser.add_flag(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="FOLDER",
        help="folder for data, classifier and report (default: %(default)s)",
    )
    add_overwrite_flag(parser)
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Run every step, saying what it does and where its result is."""
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.classifier.artifact import check_replaceable
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.data.loading import load_examples
    from qwen_vl_classifier.evaluation.compare import compare
    from qwen_vl_classifier.evaluation.evaluation import evaluate
    from qwen_vl_classifier.evaluation.report import write_report
    from qwen_vl_classifier.files.room import check_inner_folders
    from qwen_vl_classifier.scenes.colour_match import CLASSES, QUESTION, write_task
    from qwen_vl_classifier.training.probe.probe import train

    started = time.monotonic()
    out: Path = flags.out
    check_inner_folders(out, "data", "report")
    for name in ("classifier", "zero-shot"):
        check_replaceable(out / name, overwrite=flags.overwrite)

    print(f'1. Make pictures of shapes, and ask: "{QUESTION}"')
    task = write_task(out / "data")
    reading: dict[str, Any] = {"require_labels": True, "positive": CLASSES[1]}
    training, test = (load_examples(path, **reading) for path in (task.train, task.test))
    _say(f"Yes is class 1, {CLASSES[1]!r}; no is class 0, {CLASSES[0]!r}.")
    _say(f"{len(training)} pictures to train on: {task.train}")
    _say(f"{len(test)} other pictures to test on: {task.test}")

    print("2. Train on the features of builtin:tiny, a model that was never asked this")
    backbone = Backbone.load("builtin:tiny", device=flags.device)
    result = train(training, backbone=backbone, progress=flags.progress)
    print("", result, "", sep="\n")
    folder = result.classifier.save(out / "classifier")

    print("3. Load the saved classifier and evaluate it on the pictures to test on")
    classifier = Classifier.load(folder, device=flags.device)
    evaluation = evaluate(classifier, test, config=EvaluateConfig(slice_by="shapes"), training=training)
    evaluation["measured"] |= {"classifier": str(folder), "data": str(task.test)}
    report = write_report(evaluation, out / "report", examples=test)
    _say(evaluation["sentence"])

    print("4. Compare it with the same model without training (zero-shot)")
    untrained = Classifier.zero_shot(backbone)
    untrained.label_names = CLASSES
    untrained.save(out / "zero-shot")
    _say(compare([classifier, untrained], test, names=["classifier", "zero-shot"])["sentence"])

    print("5. Predict what new pictures show")
    new = load_examples(task.new)[:3]
    for example, prediction in zip(new, classifier.decide(new), strict=True):
        probability = f"probability of {CLASSES[1]!r} {prediction.probability:.3f}"
        _say(f"{CLASSES[prediction.label]:<8}  ({probability})  {example.image!s}")

    print(f"\nDone in {time.monotonic() - started:.0f} seconds. Open the report in a browser:\n  {report}")
    print("\nNext, try:")
    for what, command in commands_to_try(out, task):
        print("", what, command_line(*command), sep="\n")
    return 0


def commands_to_try(out: Path, task: Task) -> list[tuple[str, list[str]]]:
    """Return three commands to try on the files of the demo, each with what it does."""
    from qwen_vl_classifier.scenes.colour_match import CLASSES, QUESTION

    classifier = str(out / "classifier")
    trained_again = ["--positive", CLASSES[1], "--text", QUESTION, "--out", str(out / "my-classifier")]
    return [
        (
            "Classify the pictures of a table, and get the table back with the answers:",
            ["predict", classifier, str(task.new), "--out", str(out / "scored.csv")],
        ),
        (
            "Train on a folder of pictures, as you would on your own photos:",
            ["train", str(task.train.with_suffix("")), *trained_again],
        ),
        ("Classify pictures in a web page:", ["serve", classifier]),
    ]


def _say(text: str) -> None:
    print(textwrap.fill(text, _WIDTH, initial_indent="   ", subsequent_indent="   ", break_on_hyphens=False))
