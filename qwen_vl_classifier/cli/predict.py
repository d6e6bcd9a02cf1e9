"""`predict`: one picture and its text in, a probability out."""

from __future__ import annotations

import argparse
import dataclasses
import json

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.options import add_loading_flags, add_picture_flags, loading_options
from qwen_vl_classifier.errors import one_line


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "predict",
        help="classify one picture with its text",
        description="Classify one picture with its text.",
        usage="%(prog)s CLASSIFIER IMAGE TEXT [options]",
        example="qwen-vl-classifier predict demo/classifier photo.jpg 'There is a cat.'",
    )
    parser.add_argument("classifier", metavar="CLASSIFIER", help="folder of a saved classifier")
    parser.add_argument("image", metavar="IMAGE", help="file of the picture, or - for a text alone")
    parser.add_argument("text", metavar="TEXT", help="the text that goes with it")
    parser.add_flag("--json", action="store_true", help="print one JSON object")
    add_loading_flags(parser)
    add_picture_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Classify and print label, probability and decision."""
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.data.example import Example
    from qwen_vl_classifier.images.opening import open_image

    image = None if flags.image == "-" else open_image(flags.image)  # a wrong path shows before a model is loaded
    classifier = Classifier.load(flags.classifier, **loading_options(flags))
    (prediction,) = classifier.decide([Example(image, flags.text)])
    if flags.json:
        name = classifier.label_names[prediction.label]
        print(json.dumps({**dataclasses.asdict(prediction), "label_name": name}, ensure_ascii=False))
    else:
        names = [one_line(name) for name in classifier.label_names]
        print(f"label        {prediction.label} ({names[prediction.label]})")
        print(f"probability  {prediction.probability:.4f} of class 1 ({names[1]})")
        print(f"decision     {prediction.decision}")
    return 0
