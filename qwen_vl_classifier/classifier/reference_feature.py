"""One feature saved with a classifier, to recognise its backbone under other versions of libraries too.

The fingerprint of a backbone changes with the major version of transformers, since that may change what is computed.
Where nothing else differs, the numbers decide: the feature of a fixed example, read at the classifier's tap.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import OutOfMemoryError

_WIDTH, _HEIGHT, _SQUARE = 150, 110, 14  # pixels; no multiple of a patch, so that resizing is seen too
_SMALLEST = 1e-30  # of a length that is divided by
_TOLERANCE = {torch.float32: 0.005, torch.bfloat16: 0.05}
"""How far two computations of one feature may be apart, as a share of its length.

Rounding to bfloat16 moves features of random checkpoints by up to 0.05, one word more in the text by 0.02 to 1.1.
"""


def make_reference(backbone: Backbone, tap: Tap) -> dict[str, str] | None:
    """Return what is saved of a backbone: a digest of its content, and the feature of the fixed example.

    Returns:
        `content`, and `feature` as base64 of little-endian float32; `None` where there is no memory for it.
    """
    try:
        feature = _feature(backbone, tap)
    except (OutOfMemoryError, torch.OutOfMemoryError):  # a classifier without it is better than none
        return None
    return {"content": backbone.content, "feature": base64.b64encode(feature.astype("<f4").tobytes()).decode()}


def distance(reference: Mapping[str, str] | None, backbone: Backbone, tap: Tap) -> float | None:
    """Return how far the feature is from the kept one, as a share of that one's length.

    Returns:
        `None` where more than versions of libraries differs, or where no feature was kept.
    """
    if reference is None or reference["content"] != backbone.content:
        return None
    try:
        kept = np.frombuffer(base64.b64decode(reference["feature"], validate=True), dtype="<f4")
    except ValueError:  # also: a number of bytes that makes no numbers
        return None
    feature = _feature(backbone, tap)
    if kept.shape != feature.shape:
        return None
    return float(np.linalg.norm(feature - kept) / max(float(np.linalg.norm(kept)), _SMALLEST))


def tolerance(backbone: Backbone) -> float:
    """Return how far the feature may be from the kept one."""
    return _TOLERANCE[torch.bfloat16 if backbone.quantization else backbone.dtype]


def _feature(backbone: Backbone, tap: Tap) -> npt.NDArray[np.float32]:
    """Encode the fixed example; float32, shape (hidden,)."""
    with torch.inference_mode():
        features = backbone.encode_batch(backbone.processor([_example()]), [tap])
    feature: npt.NDArray[np.float32] = features[0, 0].cpu().numpy()
    return feature


def _example() -> Example:
    """Return a picture that no version of a drawing library changes, with words of several scripts."""
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    pixels = np.stack([x, y * 2, (x // _SQUARE + y // _SQUARE) % 2 * 255], axis=-1)
    return Example(Image.fromarray(pixels.astype(np.uint8)), "Is the left half darker, 3.5 times? Größe, 左边, 🙂")
