"""Heads, from a pooled feature to two logits, and the loss with which heads and whole models are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_vl_classifier.errors import ArtifactError

NUM_CLASSES = 2

_MOST_ACTIVATIONS = 1 << 24  # of stacked heads at once: 64 MB
_SHOWN_KEYS = 5  # most unexpected keys that a message lists

HeadKind = Literal["linear", "mlp"]


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The shape of a head.

    Attributes:
        kind: "mlp" for the original API's head, "linear" for logistic regression and zero-shot.
        hidden_size: Width of the features.
        units: Width of the hidden layer; 0 for "linear".
        dropout: Dropout before the last layer.
    """

    kind: HeadKind
    hidden_size: int
    units: int = 0
    dropout: float = 0.0

    @property
    def num_weights(self) -> int:
        """Number of weights, biases included."""
        if self.kind == "linear":
            return (self.hidden_size + 1) * NUM_CLASSES
        return (self.hidden_size + 1) * self.units + (self.units + 1) * NUM_CLASSES

    def build(self) -> nn.Module:
        """Make a head with fresh weights."""
        if self.kind == "linear":
            return nn.Linear(self.hidden_size, NUM_CLASSES)
        return mlp_head(self.hidden_size, self.units, self.dropout)


def mlp_head(hidden_size: int, units: int = 512, dropout: float = 0.1) -> nn.Sequential:
    """Make the head of the original API: Linear, ReLU, Dropout, Linear to two classes."""
    return nn.Sequential(nn.Linear(hidden_size, units), nn.ReLU(), nn.Dropout(dropout), nn.Linear(units, NUM_CLASSES))


class HeadStack:
    """Heads of one shape that read the same features, as one product of matrices.

    Args:
        heads: At least one, all of one `HeadSpec` and on one device; their weights are copied.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        first, last = zip(*(_first_and_last(head) for head in heads), strict=True)
        self._size = len(heads)
        self._weight = torch.cat([layer.weight.detach() for layer in first])
        self._bias = torch.cat([layer.bias.detach() for layer in first])
        self._units = 0
        if first[0] is not last[0]:
            self._units = first[0].out_features
            self._last_weight = torch.stack([layer.weight.detach().T for layer in last])
            self._last_bias = torch.stack([layer.bias.detach() for layer in last])[:, None]

    def logits_of(self, inputs: Tensor) -> Tensor:
        """Return the logits of each head, shape (n, heads, 2), from features of shape (n, hidden).

        They are those of the heads alone to rounding: sums of products may be taken in another order.
        """
        inputs = inputs.to(self._weight.device)
        if not self._units:
            return functional.linear(inputs, self._weight, self._bias).view(-1, self._size, NUM_CLASSES)
        rows = max(1, _MOST_ACTIVATIONS // (self._size * self._units))
        return torch.cat([self._of_two_layers(part) for part in torch.split(inputs, rows)])

    def _of_two_layers(self, inputs: Tensor) -> Tensor:
        hidden = functional.linear(inputs, self._weight, self._bias).relu_()
        by_head = hidden.view(-1, self._size, self._units).transpose(0, 1)
        return torch.baddbmm(self._last_bias, by_head, self._last_weight).transpose(0, 1)


def _first_and_last(head: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    return layers[0], layers[-1]


def fold_standardisation(head: nn.Module, mean: Tensor, scale: Tensor) -> None:
    """Change a head trained on (x - mean) / scale so that it gives the same logits from x itself.

    Args:
        head: A linear head, or one whose first layer is linear; changed in place.
        mean: Shape (hidden,).
        scale: Shape (hidden,), no zeros; infinity takes a feature out.
    """
    first, _ = _first_and_last(head)
    with torch.no_grad():
        weight = first.weight.double() / scale.double()
        first.bias.copy_(first.bias.double() - weight @ mean.double())
        first.weight.copy_(weight)


def fold_line(head: nn.Module, scale: float, bias: float = 0.0) -> None:
    """Change a head so that its margin, the logit of class 1 less that of class 0, is scale * margin + bias.

    Args:
        head: A linear head, or one whose last layer is linear; changed in place.
        scale: Multiplies both logits.
        bias: Goes to class 1.
    """
    _, last = _first_and_last(head)
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        last.bias[1] += bias


def row_losses(logits: Tensor, targets: Tensor, *, focal_gamma: float = 0.0) -> Tensor:
    """Return the loss of each row.

    Args:
        logits: Shape (..., 2).
        targets: Shape (...): the probability of class 1, from 0 to 1; a label is a probability of 0 or 1.
        focal_gamma: 0 is cross-entropy. Above 0 the term of each class is multiplied by (1 - p) ** gamma, p its
            predicted probability, so that rows which are right already count less (Lin et al., 2017, "Focal loss
            for dense object detection", arXiv:1708.02002, equation 4; here over both classes, each as likely as the
            target says).

    Returns:
        Shape (...).
    """
    log_p = functional.log_softmax(logits, dim=-1)
    positive = targets.to(log_p.dtype)
    terms = torch.stack([1 - positive, positive], dim=-1) * -log_p
    if focal_gamma:
        # 1 - p is the other class's p: taken from its logarithm it keeps its digits where p is close to 1.
        terms = terms * (focal_gamma * log_p.flip(-1)).exp()
    return terms.sum(dim=-1)


def load_head_weights(head: nn.Module, weights: Mapping[str, Any], *, source: str) -> None:
    """Put saved weights into a head, all of them or none.

    Args:
        head: Changed in place, unless an error is raised.
        weights: Tensors by name, from a file.
        source: The file's name, for messages.

    Raises:
        ArtifactError: Keys are missing or left over, or a shape differs; the message names them.
    """
    expected = head.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(map(str, weights.keys() - expected.keys()))
    if missing or extra:
        shown = f", first {[key[:80] for key in extra[:_SHOWN_KEYS]]}" if extra else ""
        raise ArtifactError(
            f"{source}: missing keys {missing or 'none'}, unexpected keys {len(extra) or 'none'}{shown}; "
            "give a file of classifier weights that this package saved"
        )
    for name, tensor in expected.items():
        seen = weights[name]
        if not _is_plain(seen):
            raise ArtifactError(f"{source}: {name} holds no floating-point tensor; give a file of classifier weights")
        if seen.shape != tensor.shape:
            raise ArtifactError(
                f"{source}: {name} has shape {tuple(seen.shape)}, this classifier needs {tuple(tensor.shape)}; "
                "the weights were saved from a backbone with another hidden size or another head"
            )
        if not bool(seen.float().isfinite().all()):
            raise ArtifactError(f"{source}: {name} holds NaN or infinity; give weights from a run that converged")
    head.load_state_dict(dict(weights))


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a dense tensor of a common floating-point type: a file may hold any other kind."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and value.device.type != "meta"
    )
