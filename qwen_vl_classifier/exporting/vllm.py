"""For vLLM, which serves classifiers of image and text as pooling models: `POST /classify`.

A pooling model ends in a linear layer `score` on the pooled hidden states, in float32, and a softmax. Zero-shot
classifiers are exported in the same way, two rows of the language head as `score`: vLLM can make such a layer from two
tokens itself (`classifier_from_token`), but from the whole language head, and without the bias of a calibration.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_classifier.exporting.checkpoint import PROMPT_DIFFERENCES, folded_parts, label_settings, write_checkpoint
from qwen_vl_classifier.exporting.exportable import Exportable, Written

MODEL = "classifier"
"""The name under which the server offers the model."""

_HOST = "127.0.0.1"  # vLLM itself would listen on all addresses, and answers whoever asks
_SERVER = f"http://{_HOST}:8000"
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
_RESIZED_TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True)
class _Layout:
    """How vLLM knows a classifier of one family.

    Attributes:
        architecture: What `config.json` names.
        head: Prefix of the head's weights in the files.
    """

    architecture: str
    head: str


_LAYOUTS = {
    "qwen2_vl": _Layout("Qwen2VLForSequenceClassification", "language_model.score."),
    "qwen2_5_vl": _Layout("Qwen2_5_VLForSequenceClassification", "language_model.score."),
    "qwen3_vl": _Layout("Qwen3VLForSequenceClassification", "score."),
    "qwen3_vl_moe": _Layout("Qwen3VLMoeForSequenceClassification", "score."),
    "qwen3_5": _Layout("Qwen3_5ForConditionalGeneration", "score."),
    "qwen3_5_moe": _Layout("Qwen3_5MoeForConditionalGeneration", "score."),
}
"""By `model_type`. vLLM looks for the head where its class of that family has it."""

_HYBRID = ("qwen3_5", "qwen3_5_moe")
_ON_CPUS = "on CPUs, vLLM 0.32 runs linear attention in bfloat16 and with heads of 128 alone"


def refusal(exportable: Exportable) -> str | None:
    """Refuse nothing: vLLM has a class for each family."""
    return None


def write(exportable: Exportable, folder: Path) -> Written:
    """Write a folder for `vllm serve`."""
    layout = _LAYOUTS[exportable.backbone.family.model_type]
    write_checkpoint(
        exportable,
        folder,
        head={f"{layout.head}weight": exportable.weight, f"{layout.head}bias": exportable.bias},
        changes={"architectures": [layout.architecture], **label_settings(exportable)},
    )
    command = _serve_command(exportable)
    return Written(
        folded=folded_parts(exportable, "the layer score"),
        differences=(*_DIFFERENCES, *([_ON_CPUS] if exportable.backbone.family.model_type in _HYBRID else [])),
        serve=(command,),
        ask=(_ASK,),
        card=_card(command),
        client="vllm_client.py",
        tolerance=_TOLERANCE[exportable.dtype],
        resized_tolerance=_RESIZED_TOLERANCE[exportable.dtype],
    )


_DIFFERENCES = (
    *PROMPT_DIFFERENCES,
    "pictures are resized by torchvision, whose rounding differs from Pillow's, by 1 or 2 of 255 for most pixels and "
    "more at hard edges; a picture that has its final size already is read exactly as here",
    "formats, limits and checks of pictures are those of vLLM",
    "requests of more tokens than --max-model-len are refused",
    "vLLM does not check the key of --api-key at /classify: let only a proxy that authenticates clients reach the "
    "server",
)


def _serve_command(exportable: Exportable) -> str:
    """Return the command that starts the server, FOLDER standing for the exported folder."""
    hybrid = exportable.backbone.family.model_type in _HYBRID and exportable.pooling == "mean"
    words = [
        *("vllm", "serve", "FOLDER", "--host", _HOST, "--served-model-name", MODEL),
        *("--runner", "pooling", "--convert", "classify"),
        *("--dtype", exportable.dtype, "--max-model-len", str(exportable.max_model_len)),
        *("--pooler-config", json.dumps({"seq_pooling_type": exportable.pooling.upper()})),
        *(("--no-enable-chunked-prefill",) if hybrid else ()),
    ]
    return shlex.join(words)


_MESSAGE = {
    "role": "user",
    "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,%s"}},
        {"type": "text", "text": "There is a red circle."},
    ],
}
_REQUEST = json.dumps({"model": MODEL, "messages": [_MESSAGE]})
_ASK = (
    f"printf '{_REQUEST}' \"$(base64 FOLDER/examples/1.png | tr -d '\\n')\" "
    f"| curl {_SERVER}/classify --header 'Content-Type: application/json' --data @-"
)


def _card(command: str) -> str:
    return f"""## Serve

```bash
{command}
```

`FOLDER` is this folder. Each of these options matters: without `--pooler-config` vLLM reads the last token, and with
another `--dtype` it computes something else. Then compare the server with the examples in `export.json`:
`qwen-vl-classifier export FOLDER --check {_SERVER}`.

vLLM 0.32 does not ask for the key of `--api-key` at `/classify`. Where others can reach the server, put a proxy before
it that checks who asks.

## Ask

A request is one message of the user: all pictures, then the text. `probs[1]` of the answer is the probability of class
1.

```bash
{_ASK}
```

`client.py` asks, refuses what the server would read in another way, and applies threshold, isotonic calibration and
abstention (`decide.py`, `decision.json`). The variables `VLLM_SERVER` and `VLLM_API_KEY` say where the server is and
which key a proxy before it asks for.
"""
