"""What stands in the folder of a saved classifier."""

from __future__ import annotations

from qwen_vl_classifier import Tap
from qwen_vl_classifier.classifier.artifact import (
    Manifest,
)
from qwen_vl_classifier.classifier.head import HeadSpec

MANIFEST = Manifest(
    backbone={
        "name": "some/backbone",
        "revision": None,
        "family": "qwen2_5_vl",
        "fingerprint": "0f" * 32,
        "dtype": "bfloat16",
        "quantization": None,
        "finetuned": False,
        "adapter": False,
    },
    tap=Tap(3, "last"),
    pixel_limits=(3136, 200704),
    prompt="{{ messages }}",
    head=HeadSpec("mlp", 8, units=4, dropout=0.1),
    label_names=("no", "yes"),
    temperature=1.5,
    isotonic=((0.1, 0.6, 0.7), (0.2, 0.2, 0.9)),
    threshold=0.4,
    abstention=(0.3, 0.5),
    training={"method": "probe", "rows": 12, "options": {"seed": 0}},
    versions={"torch": "2.13"},
)
