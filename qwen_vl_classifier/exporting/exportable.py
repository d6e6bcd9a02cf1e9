"""The part of a classifier that other engines can compute: a linear head on tokens pooled after the final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.layers.kinds import FULL, kind_of
from qwen_vl_classifier.backbone.prompts.text_tokens import position_limit
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.export import ExportConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.exporting.whole_prompts import joined_text

_SHORTEST, _TEXT_TOKENS = 8192, 2048
_TRAIN = "train it again with exportable=True (train --exportable)"


@dataclass(frozen=True, slots=True)
class Exportable:
    """A classifier that other engines can compute.

    Attributes:
        classifier: The classifier.
        weight: The head's weights, the temperature folded in: float32 of shape (2, hidden), class 0 first.
        bias: Its biases, the temperature folded in: float32 of shape (2,).
        depth: Number of decoder layers that are needed.
        leave_to_client: Whether what the engine does not apply is left to whoever asks the server.
        max_model_len: Most tokens of a request.
    """

    classifier: Classifier
    weight: Tensor
    bias: Tensor
    depth: int
    leave_to_client: bool
    max_model_len: int

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        return self.classifier.backbone

    @property
    def pooling(self) -> Literal["mean", "last"]:
        """Which tokens are pooled: all or the last one."""
        return cast(Literal["mean", "last"], self.classifier.tap.pooling)

    @property
    def dtype(self) -> str:
        """Type of the weights: "float32" or "bfloat16"."""
        return str(self.backbone.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Written:
    """What a target wrote, and how to use it.

    Attributes:
        folded: Sentences: what of the classifier the files contain.
        differences: Sentences: where the engine does something else than this package.
        serve: Commands that start a server; the word FOLDER stands for the exported folder.
        ask: Commands that ask it.
        card: Markdown: the section of the model card that says how to use it.
        client: File in `exporting/` that becomes `client.py`, which the model card shows behind that section.
        tolerance: Largest difference of a probability that rounding explains.
        resized_tolerance: The same where the engine resizes a picture, which it may do with other rounding.
        margin_offset: What the client must add to the logit of class 1.
    """

    folded: tuple[str, ...]
    differences: tuple[str, ...]
    serve: tuple[str, ...]
    ask: tuple[str, ...]
    card: str
    client: str
    tolerance: float
    resized_tolerance: float
    margin_offset: float = 0.0


def exportable_of(classifier: Classifier, config: ExportConfig) -> Exportable:
    """Return the part of a classifier that is exported.

    Args:
        classifier: The classifier.
        config: For which engine, and how.

    Raises:
        ConfigError: No engine gives its probabilities; the message says why, and what to do.
    """
    reason = _why_not(classifier, leave_to_client=config.leave_to_client)
    if reason:
        raise ConfigError(f"{spelled('to', config.to)}: {reason}")
    head = cast(nn.Linear, classifier.head)
    with torch.no_grad():
        # In float64, so that folding rounds once.
        weight, bias = (part.double().cpu() / classifier.temperature for part in (head.weight, head.bias))
    tap = classifier.tap
    return Exportable(
        classifier=classifier,
        weight=weight.float(),
        bias=bias.float(),
        depth=classifier.backbone.num_layers if tap.layer == LAST_NORM else tap.layer,
        leave_to_client=config.leave_to_client,
        max_model_len=config.max_model_len or _length_of(classifier.backbone),
    )


def _why_not(classifier: Classifier, *, leave_to_client: bool) -> str | None:
    """Say why no engine gives a classifier's probabilities, and what to do; `None` if some do."""
    backbone, tap = classifier.backbone, classifier.tap
    if backbone.quantization is not None:
        return (
            f"the backbone is quantised to {backbone.quantization}, and another engine quantises in another way, with "
            "other probabilities; train on the backbone without quantization, and export that"
        )
    if classifier.spec.kind != "linear":
        return f"the head is of kind {classifier.spec.kind}, and engines have linear heads; {_TRAIN}"
    if not tap.exportable:
        return (
            f"the tap is {tap}, and engines pool all tokens (mean) or the last one, after the final norm: mean:-1, "
            f"last:-1, mean:K:normed or last:K:normed; {_TRAIN}"
        )
    if tap.normed and not _attends(backbone, tap.layer):
        return (
            f"the tap {tap} leaves no layer of full attention, and engines do not run {backbone.family.name} without "
            f"one; {_TRAIN} with deeper taps"
        )
    joined = joined_text(backbone.processor)
    if joined is not None:
        return (
            f"the prompt has words beside the text, and engines, which tokenise both together, read other tokens of "
            f"texts such as {joined!r}; train with a chat template that has special tokens on both sides of the text"
        )
    left = {"isotonic calibration": classifier.isotonic, "abstention": classifier.abstention}
    names = [name for name, value in left.items() if value is not None]
    if names and not leave_to_client:
        return (
            f"the classifier has {' and '.join(names)}, which engines do not apply; pass "
            f"{spelled('leave_to_client', True)} to write it to decision.json for clients to apply, or "
            "calibrate without it"
        )
    return None


def _attends(backbone: Backbone, depth: int) -> bool:
    """Tell whether any of the first `depth` layers has full attention."""
    layers = backbone.model.language_model.layers  # type: ignore[union-attr]
    return any(kind_of(layer) == FULL for layer in layers[:depth])  # type: ignore[index]


def _length_of(backbone: Backbone) -> int:
    """Return how many tokens a request may have, so that the largest picture fits beside a text."""
    _, most = backbone.pixel_limits
    needed = max(_SHORTEST, most // backbone.processor.token_side**2 + _TEXT_TOKENS)
    return min(needed, position_limit(backbone.model.config.get_text_config()) or needed)  # type: ignore[union-attr,operator]
