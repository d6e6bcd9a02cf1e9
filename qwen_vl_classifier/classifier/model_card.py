"""Describe a classifier for people: the model card in its folder, and the facts of its training record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.backbone.prompts.thinking import thinking_in

_SENTENCES = (
    ("threshold", "objective", "{objective}"),
    (
        "calibration",
        "calibration",
        "{method} on {rows} rows, measured where it was not fitted: log loss {log_loss_before:.4f} before, "
        "{log_loss_after:.4f} after; ECE {ece_before:.4f} before, {ece_after:.4f} after",
    ),
    (
        "abstention",
        "decided",
        "{decided:.1%} of {rows} held-out rows; wrong: {error_of_all:.1%} of all, {error_of_decided:.1%} of decided",
    ),
    ("abstention", "guarantee", "{guarantee}"),
)
_MARKDOWN = re.compile(r"[\\`*_\[\]<>&|~$]")


def as_text(value: object) -> str:
    """Write a value so that Markdown shows it as it is, in one line and in one cell of a table."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(shown.split()))


def model_card(manifest: Any) -> str:
    """Return the `README.md` of a saved classifier.

    Args:
        manifest: The `Manifest` that lies beside it.
    """
    training = "\n".join(
        f"| {as_text(name)} | {as_text(value)} |" for name, value in training_facts(manifest.training).items()
    )
    versions = ", ".join(as_text(f"{name} {version}") for name, version in manifest.versions.items())
    negative, positive = map(as_text, manifest.label_names)
    name, dtype = (as_text(manifest.backbone[key]) for key in ("name", "dtype"))
    family = FAMILIES[manifest.backbone["family"]].name
    recorded = manifest.backbone.get("layers")
    layers = f"\n| decoder layers | {as_text(recorded)} |" if recorded else ""
    quantization = manifest.backbone["quantization"]
    needs = ""
    if manifest.backbone["adapter"] or quantization:
        needs = "\nIt needs `pip install 'qwen-vl-classifier[finetune]'`.\n"
    said = thinking_in(manifest.prompt)
    thinking = f"\n| thinking | {said} |" if said else ""
    return f"""# Binary classifier of image + text

Class 1 is "{positive}", class 0 is "{negative}".

| | |
|---|---|
| backbone | {name} ({family}, {dtype}{f", quantised to {quantization}" if quantization else ""}) |{layers}
| fine-tuned | {manifest.tuning} |{thinking}
| tap | {manifest.tap} |
| head | {manifest.head.kind} |
| threshold | {manifest.threshold:g} |
| temperature | {manifest.temperature:g} |
{training}

Made with {versions}.
{needs}
Use it:

```python
from qwen_vl_classifier import Classifier, Example

classifier = Classifier.load("path/to/this/folder")
classifier.predict_proba([Example("photo.jpg", "the text that goes with it")])
```
"""


def panel_card(manifest: Any, classifiers: Sequence[Any]) -> str:
    """Return the `README.md` of a saved panel.

    Args:
        manifest: The `PanelManifest` that lies beside it.
        classifiers: The `Manifest` of each of its classifiers, in the order of its labels.
    """
    answers = (
        "Every row has exactly one of these classes." if manifest.one_of else "Each label is yes or no for itself."
    )
    lines = [
        f"| {as_text(name)} | {folder.name}/ | {one.tap} | {one.head.kind} | {one.threshold:g} | "
        f"{accuracy_text(one.training.get('estimate')) or 'unknown'} |"
        for name, folder, one in zip(manifest.names, manifest.folders, classifiers, strict=True)
    ]
    table = "\n".join(lines)
    versions = ", ".join(as_text(f"{name} {version}") for name, version in manifest.versions.items())
    return f"""# Panel of classifiers of image + text

{answers} All of them read {as_text(classifiers[0].backbone["name"])} in one pass.

| {"class" if manifest.one_of else "label"} | folder | tap | head | threshold | on new rows |
|---|---|---|---|---|---|
{table}

Each folder is a saved classifier that can be used alone.

Made with {versions}.

Use it:

```python
from qwen_vl_classifier import Example, Panel

panel = Panel.load("path/to/this/folder")
panel.decide([Example("photo.jpg", "the text that goes with it")])
```
"""


def training_facts(training: Mapping[str, Any]) -> dict[str, str]:
    """Return what a training record says, by name: its plain values, then objective, calibration and abstention.

    Lists and objects of other kinds are left out, and so is one that lacks what its sentence needs.
    """
    facts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in training.items()
        if not isinstance(value, (dict, list))
    }
    return facts | answer_facts(training)


def accuracy_text(estimate: object) -> str:
    """Return the accuracy that an estimate of a training record holds, in words; empty where it holds none."""
    accuracy = estimate.get("accuracy") if isinstance(estimate, dict) else None
    try:
        return "accuracy {mean:.3f} (95 %: {low:.3f} to {high:.3f})".format_map(accuracy or {})
    except (KeyError, TypeError, ValueError):
        return ""


def training_text(training: Mapping[str, Any]) -> str | None:
    """Return the text that all training rows had, by a training record; `None` if none is recorded."""
    text = training.get("text")
    return text if isinstance(text, str) and text.strip() else None


def answer_facts(training: Mapping[str, Any]) -> dict[str, str]:
    """Return what a training record says of objective, calibration and abstention, by name, as `training_facts`."""
    facts = {}
    for key, name, sentence in _SENTENCES:
        entry = training.get(key)
        if isinstance(entry, dict):
            try:
                facts[name] = sentence.format_map(entry)
            except (KeyError, TypeError, ValueError):
                continue
    return facts
