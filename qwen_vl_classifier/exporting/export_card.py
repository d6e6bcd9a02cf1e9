"""The model card of an exported folder."""

from __future__ import annotations

from qwen_vl_classifier.classifier.model_card import as_text
from qwen_vl_classifier.exporting.export_manifest import ExportManifest


def export_card(manifest: ExportManifest, usage: str, client: str) -> str:
    """Return the `README.md` of an exported folder.

    Args:
        manifest: What lies beside it.
        usage: Markdown: how to serve and to ask.
        client: The content of `client.py`.
    """
    negative, positive = map(as_text, manifest.label_names)
    folded = "\n".join(f"- {as_text(sentence)}" for sentence in manifest.folded)
    differences = "\n".join(f"- {as_text(sentence)}" for sentence in manifest.differences)
    return f"""# Binary classifier of image + text, for {as_text(manifest.target)}

Class 1 is "{positive}", class 0 is "{negative}". Backbone: {as_text(manifest.classifier["backbone"])}, in
{manifest.dtype}. Exported by qwen-vl-classifier {as_text(manifest.versions["qwen-vl-classifier"])}.

{usage}
```python
{client}```

## What the files contain

{folded}

Threshold, and where there are any isotonic calibration and abstention, are in `decision.json`, for the client to apply.

## What is different from qwen-vl-classifier

{differences}

`export.json` says all this for programs, with 8 examples and the probabilities that a server must give for them, within
{manifest.tolerance:g} (within {manifest.resized_tolerance:g} for the one whose picture is resized).
"""
