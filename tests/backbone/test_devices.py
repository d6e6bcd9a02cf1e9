"""Names of devices and types become what torch takes, or an error of one line."""

from __future__ import annotations

import psutil
import pytest
import torch

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone import devices
from qwen_vl_classifier.backbone.devices import choose_device, choose_dtype, free_memory
from qwen_vl_classifier.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "tpu", "meta", "cpu cpu"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ConfigError, match="give auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU here"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="1 GPU"):
        choose_device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_computes_in_it(monkeypatch, capabilities, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype("auto", CPU) == wanted
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_auto_works_with_a_torch_that_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_types_by_name_or_by_torch(given):
    assert choose_dtype(given, CPU) == torch.bfloat16


@pytest.mark.parametrize("given", ["float16", torch.float16, "int8", ""])
def test_other_types_are_refused(given):
    with pytest.raises(ConfigError, match="float16 overflows"):
        choose_dtype(given, CPU)


class TestTokenBudget:
    """As many tokens at once as half of the free memory holds, within bounds."""

    @pytest.mark.parametrize(
        ("free", "device", "tokens"),
        [(10**12, "cpu", 2048), (10**12, "cuda", 16384), (0, "cpu", 256)],
    )
    def test_it_stays_within_its_bounds(self, tiny_backbone, monkeypatch, free, device, tokens):
        monkeypatch.setattr(devices, "free_memory", lambda _: free)
        config = tiny_backbone.model.config
        assert devices.choose_token_budget(config, torch.device(device), torch.float32) == tokens

    def test_between_them_it_follows_the_memory(self, nano_checkpoint, monkeypatch):
        config = Backbone.load(nano_checkpoint[1], device="cpu").model.config
        budgets = []
        for free in (20_000_000, 40_000_000):
            monkeypatch.setattr(devices, "free_memory", lambda _, free=free: free)
            budgets.append(devices.choose_token_budget(config, CPU, torch.bfloat16))
        assert 256 < budgets[0] < budgets[1] < 2048
        assert abs(budgets[1] - 2 * budgets[0]) <= 1

    def test_processes_share_what_is_free(self, tiny_backbone, monkeypatch):
        monkeypatch.setattr(devices, "free_memory", lambda _: 100_000_000)
        config = tiny_backbone.model.config
        alone, shared = (devices.choose_token_budget(config, CPU, torch.float32, sharing=count) for count in (1, 3))
        assert 256 < shared < alone < 2048
        assert abs(alone - 3 * shared) <= 3

    def test_free_memory_of_this_machine_is_a_sensible_number(self):
        assert 0 < free_memory(CPU) <= psutil.virtual_memory().total
