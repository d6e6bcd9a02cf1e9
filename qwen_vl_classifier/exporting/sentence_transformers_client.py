"""Classify with sentence-transformers and this folder: `python client.py TEXT [PICTURE ...]`.

It needs `sentence-transformers[image]` from 6.2, and `decide.py` and `decision.json` beside it.
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from sentence_transformers import CrossEncoder

from qwen_vl_classifier.exporting.decide import check_text, decide

FOLDER = Path(__file__).resolve().parent


@cache
def loaded() -> tuple[Any, dict[str, Any]]:
    """Return the model and the content of `decision.json`."""
    return CrossEncoder(str(FOLDER)), json.loads((FOLDER / "decision.json").read_text(encoding="utf-8"))


def probabilities(rows: Sequence[tuple[Sequence[Image.Image], str]]) -> list[float]:
    """Return the model's probability of class 1 for rows of pictures and a text; `decide` takes it from there."""
    model, rules = loaded()
    pairs = []
    for pictures, text in rows:
        check_text(text, rules, pictures=bool(pictures))
        images = [ImageOps.exif_transpose(picture).convert("RGB") for picture in pictures]
        # Each under its kind: a bare text that is the address of a picture would be fetched.
        pairs.append(({"image": images} if images else {"text": ""}, {"text": text}))
    found: list[float] = model.predict(pairs)[:, 1].tolist()  # the columns are class 0 and class 1
    return found


if __name__ == "__main__":
    (probability,) = probabilities([([Image.open(path) for path in sys.argv[2:]], sys.argv[1])])
    sys.stdout.write(json.dumps(decide(probability, loaded()[1]), ensure_ascii=False) + "\n")
