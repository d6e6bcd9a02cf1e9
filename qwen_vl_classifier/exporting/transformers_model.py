"""For transformers alone: a checkpoint that `AutoModelForSequenceClassification` loads.

In versions 5.17 to 5.23, transformers has such a class with pictures for one family, Qwen3.5. It reads the last token
that is no padding, after the final norm, by a linear layer without bias. A bias cannot be folded into the weights, for
no direction is constant behind an RMSNorm. Of two biases their difference matters, which can be left to whoever asks,
as an offset of the margin.
"""

from __future__ import annotations

from pathlib import Path

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.exporting.checkpoint import PROMPT_DIFFERENCES, folded_parts, label_settings, write_checkpoint
from qwen_vl_classifier.exporting.exportable import Exportable, Written

ARCHITECTURES = {"qwen3_5": "Qwen3_5ForSequenceClassification"}
"""transformers' classes that take pictures, by `model_type`."""

_HEAD = "score.weight"
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def refusal(exportable: Exportable) -> str | None:
    """Explain why transformers cannot give the same probabilities, and what to do; `None` if it can."""
    family, processor = exportable.backbone.family, exportable.backbone.processor
    another = f"export it with {spelled('to', 'sentence-transformers')}"
    if family.model_type not in ARCHITECTURES:
        return (
            f"the backbone is {family.name}, and transformers has no class that classifies sequences with pictures for "
            f"it, as it has for Qwen3.5; {another}"
        )
    if exportable.pooling != "last":
        return f"the tap is {exportable.classifier.tap}, and transformers' class reads the last token; {another}"
    if processor.encode(Example(None, "?")).ids[-1] == processor.pad_token_id:
        return (
            "the prompt ends in the token that pads, and transformers' class reads the last token that does not pad; "
            f"{another}"
        )
    if margin_offset(exportable) and not exportable.leave_to_client:
        return (
            "the head has a bias, and that of transformers' class has none; pass "
            f"{spelled('leave_to_client', True)} to write it to decision.json as margin_offset, or {another}"
        )
    return None


def write(exportable: Exportable, folder: Path) -> Written:
    """Write a folder for `AutoModelForSequenceClassification`."""
    backbone = exportable.backbone
    write_checkpoint(
        exportable,
        folder,
        head={_HEAD: exportable.weight},
        changes={"architectures": [ARCHITECTURES[backbone.family.model_type]], **label_settings(exportable)},
        text_changes={"pad_token_id": backbone.processor.pad_token_id},  # by which the last token of a row is found
    )
    tolerance = _TOLERANCE[exportable.dtype]
    return Written(
        folded=folded_parts(exportable, f"the layer {_HEAD.partition('.')[0]}"),
        differences=_DIFFERENCES,
        serve=(),
        ask=(_ASK,),
        card=_CARD,
        client="transformers_client.py",
        tolerance=tolerance,
        resized_tolerance=tolerance,
        margin_offset=margin_offset(exportable),
    )


def margin_offset(exportable: Exportable) -> float:
    """Return the part of the margin that a head without bias leaves out."""
    return float(exportable.bias[1] - exportable.bias[0])


_DIFFERENCES = (
    *PROMPT_DIFFERENCES,
    "a bias of the head is margin_offset in decision.json, which client.py adds to the logit of class 1",
    "transformers resizes pictures by torchvision, whose rounding differs, unless told to use Pillow, as in client.py",
    "in bfloat16 the head is rounded too",
    "pictures are opened without the limits and checks of qwen-vl-classifier",
)

_ASK = "python FOLDER/client.py TEXT PICTURE"

_CARD = """## Use

```bash
pip install "transformers>=5.17,<6" torchvision pillow
python FOLDER/client.py "There is a tower." FOLDER/examples/1.png
```

`FOLDER` is this folder. `client.py` loads the model, asks it in batches and decides; it is yours to copy:

"""
