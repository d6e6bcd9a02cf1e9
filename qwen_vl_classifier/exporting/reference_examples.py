"""Examples with known probabilities, by which a server is checked: synthetic pictures, free for anyone to pass on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import check_numbers, probabilities
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.exporting.export_manifest import ReferenceExample
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.scenes.statements import scene_examples

FOLDER = "examples"
"""Of the exported folder: where the pictures are."""

_SCENES = 7
_ENLARGED = (500, 370)  # pixels, of no size that a patch divides


def write_examples(classifier: Classifier, folder: Path) -> tuple[ReferenceExample, ...]:
    """Write the pictures of the reference examples, and compute their probabilities.

    They are of every form that a request has: one picture, two of them, none, and a text of several lines and scripts.
    All pictures but one have a size that no engine changes.

    Args:
        classifier: The classifier.
        folder: The folder that is being exported.
    """
    processor = classifier.backbone.processor
    (folder / FOLDER).mkdir()
    images: list[str] = []
    texts: list[str] = []
    for number, (picture, _, lines) in enumerate(scene_examples("evaluation", scenes=_SCENES, per_scene=1), start=1):
        images.append(f"{FOLDER}/{number}.png")
        texts.append(lines[0].text)
        if number == _SCENES:
            picture.resize(_ENLARGED, Image.Resampling.BICUBIC).save(folder / images[-1])
        else:
            (pixels,) = processor.resize_pictures([picture]).pixels
            Image.fromarray(pixels).save(folder / images[-1])
    chosen = [
        *((text, (image,)) for text, image in zip(texts[:4], images[:4], strict=True)),
        (texts[4], (images[4], images[5])),
        (texts[5], ()),
        ("Première ligne : 1 € = 100 ¢\n第二行。", (images[0],)),
        (texts[-1], (images[-1],)),
    ]
    rows = [Example([folder / name for name in names] or None, text) for text, names in chosen]
    features = extract_features(rows, classifier.backbone, [classifier.tap])[:, 0]
    logits = check_numbers(classifier.logits_of(features))
    engine = probabilities(logits, classifier.temperature)[:, 1]
    final = classifier.probabilities_of(features)[:, 1]
    return tuple(
        ReferenceExample(
            text=text,
            images=names,
            tokens=len(processor.encode(row).ids),
            resized=images[-1] in names,
            probability=float(probability),
            decision=classifier.decision_of(float(calibrated)).decision,
        )
        for (text, names), row, probability, calibrated in zip(chosen, rows, engine, final, strict=True)
    )
