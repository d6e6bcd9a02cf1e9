"""The model card of a saved classifier: what it is, for people who find its folder."""

from __future__ import annotations

import re
from typing import Any

from qwen_vl_classifier.classifier.record import training_facts

_MARKDOWN = re.compile(r"[\\`*_\[\]<>&|~$]")


def _as_text(value: object) -> str:
    """Write a value so that Markdown shows it as it is, in one line and in one cell of a table."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(shown.split()))


def model_card(manifest: Any) -> str:
    """Return the `README.md` of a saved classifier.

    Args:
        manifest: The `Manifest` that lies beside it.
    """
    training = "\n".join(
        f"| {_as_text(name)} | {_as_text(value)} |" for name, value in training_facts(manifest.training).items()
    )
    versions = ", ".join(_as_text(f"{name} {version}") for name, version in manifest.versions.items())
    negative, positive = map(_as_text, manifest.label_names)
    name, family, dtype = (_as_text(manifest.backbone[key]) for key in ("name", "family", "dtype"))
    quantization = manifest.backbone["quantization"]
    needs = ""
    if manifest.backbone["adapter"] or quantization:
        needs = "\nIt needs `pip install 'qwen-vl-classifier[finetune]'`.\n"
    return f"""# Binary classifier of image + text

Class 1 is "{positive}", class 0 is "{negative}".

| | |
|---|---|
| backbone | {name} ({family}, {dtype}{f", quantised to {quantization}" if quantization else ""}) |
| fine-tuned | {manifest.tuning} |
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
