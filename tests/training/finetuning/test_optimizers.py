"""Optimisers of fine-tuning: their steps, what they refuse, and that their state goes on exactly."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from qwen_vl_classifier import FinetuneConfig, finetune
from qwen_vl_classifier.errors import ConfigError, MissingExtraError
from qwen_vl_classifier.training.finetuning.optimizers import ADAMW, PAGED, check_optimizer, make_optimizer
from tests.tuning import ROWS, VALIDATION

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def weights() -> nn.Parameter:
    """Enough of them for 8 bits: bitsandbytes keeps fewer than 4096 in float32."""
    return nn.Parameter(torch.linspace(-1, 1, 2 * 4096).reshape(2, 4096))


def take_steps(weight: nn.Parameter, optimizer: torch.optim.Optimizer, first: int, count: int) -> torch.Tensor:
    for step in range(first, first + count):
        weight.grad = torch.sin(7 * weight.detach() + step)
        optimizer.step()
    return weight.detach().clone()


def test_adamw_takes_its_step_in_one_kernel_on_gpus():
    """A CPU has that kernel too, so that it can be compared."""
    stepped = []
    for device, is_fused in ((CPU, False), (CUDA, True)):
        weight = weights()
        optimizer = make_optimizer(ADAMW, [{"params": [weight], "lr": 1e-2}], 0.01, device)
        assert optimizer.defaults["fused"] is is_fused
        stepped.append(take_steps(weight, optimizer, 0, 3))
    torch.testing.assert_close(*stepped, rtol=1e-5, atol=1e-6)
    assert not torch.equal(stepped[0], weights())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_paged_optimizer_goes_on_exactly_from_what_was_saved(tmp_path):
    """Its 8-bit arithmetic is run on the CPU here, without pages."""

    def make(weight: nn.Parameter) -> torch.optim.Optimizer:
        return make_optimizer(PAGED, [{"params": [weight], "lr": 1e-2}], 0.01, CUDA)

    weight = weights()
    optimizer = make(weight)
    middle = take_steps(weight, optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    whole = take_steps(weight, optimizer, 3, 3)
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    again = nn.Parameter(middle)
    resumed = make(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert torch.equal(take_steps(again, resumed, 3, 3), whole)
    lost = nn.Parameter(middle)
    assert not torch.equal(take_steps(lost, make(lost), 3, 3), whole)


def test_the_paged_optimizer_is_refused_where_it_does_not_run(start, monkeypatch):
    config = FinetuneConfig(optimizer=PAGED)
    with pytest.raises(ConfigError, match=r"^optimizer='paged-adamw-8bit' on cpu: .*use optimizer='adamw'$"):
        finetune(start, ROWS, VALIDATION, config=config, progress=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer(ADAMW, CPU)
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        check_optimizer(PAGED, CUDA)
    with pytest.raises(ConfigError, match="optimizer 'sgd': give one of adamw, paged-adamw-8bit"):
        FinetuneConfig(optimizer="sgd")
