"""For sentence-transformers: a `CrossEncoder`, which takes pairs of picture and text and returns scores.

Its modules are the backbone, `Pooling` over all tokens or the last one, and `Dense`: the logistic head. `Dense` has no
softmax over classes, and for two classes needs none: class 1 has the logistic function of the margin, class 0 that of
minus the margin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_vl_classifier.exporting.checkpoint import PROMPT_DIFFERENCES, folded_parts, write_checkpoint, write_json
from qwen_vl_classifier.exporting.exportable import Exportable, Written

VERSION = "6.2.0"
"""Of sentence-transformers, whose layout is written and with which it was tried."""

PAIRS = (
    "{% if messages | selectattr('role', 'equalto', 'query') | list %}"
    "{% if messages | length != 2 %}{{ raise_exception('the classifier knows no prompt beside a pair') }}{% endif %}"
    "{% if messages[1].content | rejectattr('type', 'equalto', 'text') | list %}"
    "{{ raise_exception(\"the second of a pair is a picture; pass pairs of {'image': PICTURE} and {'text': TEXT}\") }}"
    "{% endif %}"
    "{% set messages = [{'role': 'user', 'content':"
    " messages[0].content | rejectattr('text', 'equalto', '') | list + messages[1].content}] %}"
    "{% endif +%}"
)
"""Put before a chat template. sentence-transformers gives it a pair as messages of two roles, query and document; this
makes one message of the user of them, the picture first."""

_POOLING_FOLDER, _HEAD_FOLDER = "1_Pooling", "2_Dense"
_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    (_POOLING_FOLDER, "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    (_HEAD_FOLDER, "sentence_transformers.base.modules.dense.Dense"),
)
_POOLINGS = {"mean": "mean", "last": "lasttoken"}
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def refusal(exportable: Exportable) -> str | None:
    """Return `None`: sentence-transformers can compute whatever is exportable, in all families."""
    return None


def write(exportable: Exportable, folder: Path) -> Written:
    """Write a folder for `CrossEncoder`."""
    write_checkpoint(
        exportable,
        folder,
        head={},
        changes={"architectures": [exportable.backbone.family.model_class]},
        before_template=PAIRS,
    )
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind} for number, (path, kind) in enumerate(_MODULES)
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "__version__": {"sentence_transformers": VERSION},
            "activation_fn": "torch.nn.modules.linear.Identity",  # the head has its own
            "default_prompt_name": None,
            "prompts": {},
        },
    )
    write_json(folder / "sentence_bert_config.json", _reading())
    _write_pooling(exportable, folder / _POOLING_FOLDER)
    _write_head(exportable, folder / _HEAD_FOLDER)
    tolerance = _TOLERANCE[exportable.dtype]
    return Written(
        folded=folded_parts(exportable, "the module Dense, a logistic function of the margin and of minus the margin"),
        differences=_DIFFERENCES,
        serve=(),
        ask=(_ASK,),
        card=_CARD,
        client="sentence_transformers_client.py",
        tolerance=tolerance,
        resized_tolerance=tolerance,
    )


def _reading() -> dict[str, Any]:
    """Return how the module of the backbone reads its inputs: everything as chat messages, nothing cut off."""
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {
            **dict.fromkeys(("text", "image", "image+text"), output),
            "message": {**output, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}, "text": {"truncation": False}},
        "processor_kwargs": {"use_fast": False},  # resizes by Pillow; `backend` would apply to videos too, and fail
        "unpad_inputs": False,  # positions of pictures are not kept in unpadded rows
    }


def _write_pooling(exportable: Exportable, folder: Path) -> None:
    folder.mkdir()
    settings = {
        "embedding_dimension": exportable.backbone.hidden_size,
        "pooling_mode": _POOLINGS[exportable.pooling],
        "include_prompt": True,
    }
    write_json(folder / "config.json", settings)


def _write_head(exportable: Exportable, folder: Path) -> None:
    """Write the logistic head: class 0 first, as everywhere."""
    folder.mkdir()
    settings = {
        "in_features": exportable.backbone.hidden_size,
        "out_features": 2,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Sigmoid",
        "module_input_name": "sentence_embedding",
        "module_output_name": "scores",
    }
    write_json(folder / "config.json", settings)
    weight, bias = (part[1] - part[0] for part in (exportable.weight, exportable.bias))
    weights = {"linear.weight": torch.stack([-weight, weight]), "linear.bias": torch.stack([-bias, bias])}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_DIFFERENCES = (
    *PROMPT_DIFFERENCES,
    "a text that is the address or path of a picture is taken for the picture unless it is passed as {'text': TEXT}",
    "in bfloat16 the head is rounded too",
    "pictures are opened without the limits and checks of qwen-vl-classifier",
)

_ASK = "python FOLDER/client.py TEXT PICTURE"

_CARD = f"""## Use

```bash
pip install "sentence-transformers[image]>={VERSION}"
python FOLDER/client.py "There is a tower." FOLDER/examples/1.png
```

`FOLDER` is this folder. A row is a pair of dictionaries, and its scores are the probabilities of class 0 and class 1:

```python
CrossEncoder("FOLDER").predict([({{"image": picture}}, {{"text": "There is a tower."}})])
```

`client.py` loads the model, asks it in batches and decides; it is yours to copy:

"""
