"""`demo`: the whole job on synthetic scenes, from data to prediction, in a minute or two."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.options import add_device_flag, add_overwrite_flag
from qwen_vl_classifier.config.evaluate import EvaluateConfig

_TRAINING_SCENES, _TEST_SCENES, _PER_SCENE = 400, 200, 3
_TEST_SEED = 1  # other scenes than those of training, whose seed is 0


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "demo",
        help="make data, train, evaluate, save, reload and predict, offline",
        description="Run the whole job on synthetic scenes with the built-in backbone, offline.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="(default: %(default)s)")
    add_overwrite_flag(parser)
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Run every step, saying what it does and where its result lies."""
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.classifier.artifact import check_replaceable
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.data.loading import load_examples
    from qwen_vl_classifier.evaluation.evaluation import evaluate
    from qwen_vl_classifier.evaluation.report import write_report
    from qwen_vl_classifier.evaluation.terminal import evaluation_table
    from qwen_vl_classifier.files.room import check_inner_folders
    from qwen_vl_classifier.scenes.statements import write_dataset
    from qwen_vl_classifier.training.probe.probe import train

    started = time.monotonic()
    out: Path = flags.out
    check_inner_folders(out, "data", "report")
    check_replaceable(out / "classifier", overwrite=flags.overwrite)
    print("1. Data: pictures of shapes, with statements that are true (1) or false (0)")
    files = {
        name: write_dataset(out / "data", name=name, seed=seed, scenes=scenes, per_scene=_PER_SCENE)
        for name, seed, scenes in (("train", 0, _TRAINING_SCENES), ("test", _TEST_SEED, _TEST_SCENES))
    }
    training, test = (load_examples(path, require_labels=True) for path in files.values())
    print(f"   {len(training)} rows to train on, {len(test)} to test on, for example")
    print(f"   {training[0].label}  {training[0].text}  ({training[0].image!s})")
    print("2. Train: features are read once from builtin:tiny, then heads are trained on them")
    backbone = Backbone.load("builtin:tiny", device=flags.device)
    result = train(training, backbone=backbone)
    print("   " + str(result).replace("\n", "\n   "))
    print("3. Save, and load again")
    folder = result.classifier.save(out / "classifier")
    classifier = Classifier.load(folder, device=flags.device)
    print("4. Evaluate on scenes that training never saw")
    evaluation = evaluate(classifier, test, config=EvaluateConfig(slice_by="kind"), training=training)
    print(evaluation_table(evaluation))
    report = write_report(evaluation, out / "report", examples=test)
    print("5. Predict")
    for example, prediction in zip(test[:3], classifier.decide(test[:3]), strict=True):
        print(f"   {prediction.probability:.3f} {prediction.decision:<3} (truth: {example.label})  {example.text}")
    print(f"\n{evaluation['sentence']}")
    print(f"data       {out / 'data'}\nclassifier {folder}\nreport     {report}")
    print(f"done in {time.monotonic() - started:.0f} s")
    return 0
