"""`serve` with a model that fails on request: the same command, for the benchmark of what a server survives.

    python benchmarks/serving_faults.py CLASSIFIER --port 0

A pass in which a text begins with "poison" raises, one with "memory" runs out of memory, and one with "slow" takes a
fifth of a second longer. Each pass appends one line of JSON to the file in PASSES: the moment it began, by the clock
that all processes of a machine share, and its texts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import OutOfMemoryError

_SLOWLY = 0.2  # seconds
_encode = Backbone.encode_prepared


def encode_or_fail(backbone: Backbone, prepared: Sequence[EncodedExample], *arguments: Any, **options: Any) -> Any:
    """Do what `Backbone.encode_prepared` does, unless a text asks for something else."""
    texts = [backbone.processor.tokenizer.decode(item.ids[slice(*item.spans.text)]).strip() for item in prepared]
    with Path(os.environ["PASSES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"began": time.monotonic(), "texts": texts}) + "\n")
    if any(text.startswith("slow") for text in texts):
        time.sleep(_SLOWLY)
    if any(text.startswith("poison") for text in texts):
        raise RuntimeError("poison")
    if any(text.startswith("memory") for text in texts):
        raise OutOfMemoryError("as asked")
    return _encode(backbone, prepared, *arguments, **options)


if __name__ == "__main__":
    Backbone.encode_prepared = encode_or_fail  # type: ignore[method-assign]
    sys.exit(main(["serve", *sys.argv[1:]]))
