"""Questions in words, answered by the backbone itself: how likely each label is as the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.serving.decisions.questions import LETTERS, NO_AND_YES

_TAP = Tap(LAST_NORM, "last")


class LabelReader:
    """Read probabilities of labels, from single rows of the backbone's language head.

    Args:
        backbone: The backbone, whose rows are read from its files at once, if it has them.

    Attributes:
        unavailable: Why it can answer nothing, in one line that names no model and no path; `None` if it can.
        takes_pictures: Whether pictures may stand amid a text.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._rows: dict[str, npt.NDArray[np.float64]] = {}
        self.unavailable: str | None = None
        self.takes_pictures = False
        if backbone.num_layers < backbone.total_layers:
            self.unavailable = "the backbone is loaded only up to the layer that its classifiers read"
            return
        for labels in (NO_AND_YES, LETTERS):
            try:
                rows = backbone.token_rows(labels).double().numpy()
            except (CheckpointError, ConfigError):  # no language head; or labels that are no single tokens
                continue
            self._rows |= dict(zip(labels, rows, strict=True))
        if not self._rows:
            self.unavailable = "the checkpoint has no language head"
        self.takes_pictures = backbone.processor.interleaves

    def has(self, labels: Sequence[str]) -> bool:
        """Tell whether each of some labels is one token of the checkpoint."""
        return all(label in self._rows for label in labels)

    def score(self, scorings: Sequence[tuple[EncodedExample, tuple[str, ...]]]) -> list[dict[str, float]]:
        """Run one pass, and return for each prompt the softmax over the logits of its labels."""
        features = self._backbone.encode_prepared([example for example, _ in scorings], [_TAP])
        return [
            self._probabilities(feature, labels)
            for feature, (_, labels) in zip(features[:, 0].astype(np.float64), scorings, strict=True)
        ]

    def _probabilities(self, feature: npt.NDArray[np.float64], labels: Sequence[str]) -> dict[str, float]:
        logits = np.stack([self._rows[label] for label in labels]) @ feature
        weights = np.exp(logits - logits.max())
        return dict(zip(labels, (weights / weights.sum()).tolist(), strict=True))
