"""The loss: torch's own cross-entropy where it has one, the formula of the paper beyond."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qwen_vl_classifier.classifier.head import row_losses

LOGITS = torch.tensor([[1.0, -2.0], [0.3, 0.4], [-3.0, 5.0], [2.0, 2.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0])


def test_labels_give_cross_entropy():
    assert row_losses(LOGITS, LABELS).mean() == pytest.approx(functional.cross_entropy(LOGITS, LABELS).item())


def test_soft_targets_give_cross_entropy_of_probabilities():
    targets = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    wanted = functional.cross_entropy(LOGITS, torch.stack([1 - targets, targets], dim=1))
    assert row_losses(LOGITS, targets).mean() == pytest.approx(wanted.item())


def test_focal_loss_is_that_of_the_paper():
    p = LOGITS.softmax(dim=1)[torch.arange(4), LABELS]
    assert torch.allclose(row_losses(LOGITS, LABELS, focal_gamma=2.0), -((1 - p) ** 2) * p.log())


def test_sure_and_right_or_wrong_stays_finite():
    logits = torch.tensor([[300.0, -300.0], [300.0, -300.0]], requires_grad=True)
    loss = row_losses(logits, torch.tensor([0, 1]), focal_gamma=2.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(300.0)
    assert logits.grad.isfinite().all()


def test_folds_are_rows_of_rows():
    stacked = row_losses(torch.stack([LOGITS, -LOGITS]), torch.stack([LABELS, LABELS]))
    assert torch.equal(stacked[1], row_losses(-LOGITS, LABELS))
