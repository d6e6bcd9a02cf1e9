"""What a search tries: taps, and heads at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import EXPORTABLE_POOLINGS, LAST_NORM, POOLINGS, Tap
from qwen_vl_classifier.config.fields import split_list
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import HEADS
from qwen_vl_classifier.errors import ConfigError

HeadName = Literal["zero-shot", "calibrated", "linear", "mlp"]

_AUTO_DEPTHS = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A head at a tap, and its answers to rows that it was not trained on.

    Attributes:
        tap: Where it reads.
        head: Its kind; "calibrated" is zero-shot with a scale and a bias.
        margins: float64, shape (n,): the out-of-fold log odds of class 1.
        l2: Penalty of "linear", else `None`.
        epochs: Passes over the data of "mlp", else `None`.
    """

    tap: Tap
    head: HeadName
    margins: npt.NDArray[np.float64]
    l2: float | None = None
    epochs: int | None = None

    def cost(self) -> tuple[float, int, str]:
        """Return what orders candidates that are equally good: the earlier layer first, then the simpler head."""
        return depth_of(self.tap), HEADS.index(self.head), str(self.tap)


def depth_of(tap: Tap) -> float:
    """Return the layer of a tap, the last norm being beyond all."""
    return float("inf") if tap.layer == LAST_NORM else tap.layer


def candidate_taps(text: str, backbone: Backbone, *, exportable: bool = False) -> list[Tap]:
    """Return the taps that an option names.

    Args:
        text: A list such as "mean:-1,last:24", or "auto": the four poolings at the last norm and at seven layers
            spread over the depth, or at all layers where there are no more than eight.
        backbone: Says how deep it is.
        exportable: "auto" means the taps of these layers that other engines can read, and others are refused.

    Raises:
        ConfigError: A tap is malformed, the backbone does not have it, or it is not exportable and should be.
    """
    if text == "auto" and exportable:
        end = backbone.total_layers  # its output after the final norm is layer -1
        taps = [
            Tap(layer, pooling, normed=True)
            for layer in _auto_layers(backbone)
            for pooling in EXPORTABLE_POOLINGS
            if layer != end
        ]
    elif text == "auto":
        taps = [Tap(layer, pooling) for layer in _auto_layers(backbone) for pooling in POOLINGS]
    else:
        taps = list(dict.fromkeys(map(Tap.parse, split_list(text) or (text,))))
    for tap in taps:
        if exportable and not tap.exportable:
            raise ConfigError(
                f"tap {tap} with {spelled('exportable', True)}: other engines pool all tokens or the last one, after "
                f"the final norm; give {Tap(tap.layer, 'mean', normed=True)} or {Tap(tap.layer, 'last', normed=True)}"
            )
    return list(backbone.check_taps(taps))


def _auto_layers(backbone: Backbone) -> list[int]:
    depth, whole = backbone.num_layers, backbone.num_layers == backbone.total_layers
    if depth <= _AUTO_DEPTHS:
        layers = list(range(1, depth + 1))
    else:
        layers = [round(depth * part / _AUTO_DEPTHS) for part in range(1, _AUTO_DEPTHS + (not whole))]
    return [*layers, LAST_NORM] if whole else layers


def distinct_taps(features: npt.NDArray[np.float32], taps: Sequence[Tap]) -> list[int]:
    """Return the numbers of the taps that are worth trying, the earlier layer first.

    Left out are taps whose span is empty in all rows, such as that of images where there are none, and those that read
    the same as another.

    Args:
        features: Shape (n, taps, hidden).
        taps: In the order of the second axis.
    """
    kept: list[int] = []
    order = sorted(range(len(taps)), key=lambda one: (depth_of(taps[one]), POOLINGS.index(taps[one].pooling)))
    for number in order:
        values = features[:, number]
        if values.any() and not any(
            taps[other].layer == taps[number].layer and np.array_equal(features[:, other], values) for other in kept
        ):
            kept.append(number)
    return kept or order[:1]
