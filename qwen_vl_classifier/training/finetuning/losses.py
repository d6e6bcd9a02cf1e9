"""The loss that heads and whole models are trained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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


def classification_loss(
    logits: Tensor, targets: Tensor, *, weights: Tensor | None = None, focal_gamma: float = 0.0
) -> Tensor:
    """Return the weighted mean of the rows' losses: sum(weight * loss) / sum(weight).

    Args:
        logits: Shape (n, 2).
        targets: Shape (n,), labels or probabilities of class 1.
        weights: Shape (n,), 0 or more, not all 0; `None` weighs all rows alike.
        focal_gamma: As in `row_losses`.

    Returns:
        A scalar that gradients flow from.
    """
    losses = row_losses(logits, targets, focal_gamma=focal_gamma)
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.dtype)
    return (weights * losses).sum() / weights.sum()
