"""`explain`: show which squares of a picture and which words moved one answer."""

from __future__ import annotations

import argparse
import textwrap
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.options import add_loading_flags, add_picture_flags, loading_options
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.whole import new_file

if TYPE_CHECKING:
    from PIL import Image

    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.evaluation.explanation import Explanation

_WORD_COLUMNS = 22
_BAR_COLUMNS = 22  # on either side; with word and number a line has 79


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "explain",
        help="show which parts of a picture and its text moved one answer",
        description="Show which squares of a picture and which words moved the probability of class 1.",
        usage="%(prog)s CLASSIFIER IMAGE TEXT [options]",
        example="qwen-vl-classifier explain demo/classifier demo/data/new/01.png \\\n    "
        "'Do all shapes have the same colour?'",
    )
    parser.add_argument("classifier", type=Path, metavar="CLASSIFIER", help="folder of a saved classifier")
    parser.add_argument("image", metavar="IMAGE", help="file of the picture, or - for a text alone")
    parser.add_argument("text", metavar="TEXT", help="the text that goes with it")
    parser.add_flag(
        "--further",
        type=Path,
        metavar="IMAGE",
        action="append",
        default=[],
        help="a further picture of the same example; may be given several times",
    )
    parser.add_flag(
        "--method",
        default="gradients",
        metavar="NAME",
        help="gradients; tokens, which is exact for a linear head that reads an average over tokens; or occlusion, "
        "which is slow (default: %(default)s)",
    )
    parser.add_flag(
        "--baseline",
        rare=True,
        choices=("average", "empty"),
        help="picture to compare with, for gradients and occlusion: the average training picture, or an empty one "
        "(default: average if the classifier has it)",
    )
    parser.add_flag(
        "--out", type=Path, metavar="PNG", help="draw a heat map over the picture, and write it to this file"
    )
    parser.add_flag("--json", action="store_true", help="print every contribution as JSON")
    add_loading_flags(parser)
    add_picture_flags(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Explain one answer as the flags say."""
    if flags.out is not None and flags.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {flags.out}: a heat map is a PNG file; give a name that ends in .png")

    import json

    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.data.example import Example
    from qwen_vl_classifier.evaluation.explanation import explain
    from qwen_vl_classifier.evaluation.explanation_picture import draw_explanation

    images = ([] if flags.image == "-" else [Path(flags.image)]) + flags.further
    if flags.out is not None and any(image.resolve() == flags.out.resolve() for image in images):
        raise ConfigError(f"--out {flags.out}: is the picture itself, which would be lost; give another name")
    classifier = Classifier.load(flags.classifier, **loading_options(flags))
    explanation = explain(classifier, Example(tuple(images), flags.text), method=flags.method, baseline=flags.baseline)
    if flags.out is not None:
        _save(draw_explanation(images, explanation), flags.out)
    # Plain ASCII: other people's words cannot carry codes for the terminal.
    print(json.dumps(explanation.to_json()) if flags.json else table(classifier, explanation))
    return 0


def table(classifier: Classifier, explanation: Explanation) -> str:
    """Lay an explanation out for a terminal of 80 columns."""
    decision = classifier.decision_of(explanation.probability).decision
    picture = sum(float(grid.sum()) for grid in explanation.patches)
    words = sum(value for _, value in explanation.words)
    largest = max((abs(value) for _, value in explanation.words), default=0.0) or 1.0
    towards = [
        "towards " + (f"class {number}" if name == str(number) else textwrap.shorten(name, 14, placeholder="…"))
        for number, name in enumerate(classifier.label_names)
    ]
    curve = "   before the isotonic curve" if classifier.isotonic else ""
    lines = [
        f"probability of class 1   {explanation.probability:.4f}   decision: {decision}",
        f"its log odds             {explanation.log_odds:+.4f}{curve}",
        f"  from the picture       {picture:+.4f}",
        f"  from the words         {words:+.4f}",
        f"  from the template      {explanation.template:+.4f}",
        f"  from no token          {explanation.rest:+.4f}",
        f"by {explanation.method}{', exact' * explanation.exact}",
        *(textwrap.fill(line, 79, break_on_hyphens=False) for line in explanation.summary()),
        "",
        f"{'word':<{_WORD_COLUMNS}}   log odds {towards[0]:>{_BAR_COLUMNS}}|{towards[1]}",
    ]
    for word, value in explanation.words:
        size = round(_BAR_COLUMNS * abs(value) / largest)
        bar = f"{'-' * size if value < 0 else '':>{_BAR_COLUMNS}}|{'+' * size if value > 0 else ''}"
        lines.append(f"{_fitted(word, _WORD_COLUMNS)} {value:>+10.3g} {bar}")
    return "\n".join(lines)


def _fitted(word: str, columns: int) -> str:
    """Pad or cut a word to a number of columns, with question marks for what is not printable."""
    fitted, used = "", 0
    for character in word:
        shown = character if character.isprintable() else "?"
        width = 0 if unicodedata.combining(shown) else 1 + (unicodedata.east_asian_width(shown) in "WF")
        if used + width > columns:
            break
        fitted += shown
        used += width
    return fitted + " " * (columns - used)


def _save(picture: Image.Image, path: Path) -> None:
    try:
        with new_file(path) as file:
            picture.save(file, "PNG")
    except OSError as error:
        raise ConfigError(
            f"--out {path}: cannot be written ({error.strerror or type(error).__name__}); "
            "give a place that can be written, on a disk with room"
        ) from error
