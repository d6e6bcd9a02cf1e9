"""Names of devices and types become what torch takes, or an error of one line."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone import devices
from qwen_vl_classifier.backbone.devices import (
    choose_device,
    choose_devices,
    choose_dtype,
    free_memory,
    gpu_names,
    is_out_of_memory,
    release_memory,
)
from qwen_vl_classifier.errors import ConfigError

CPU = torch.device("cpu")


class Card:
    """A GPU as torch would describe it, where there is none.

    Args:
        kind: "cuda" (ROCm too), "mps" or "xpu".
        name: What its maker calls it.
        bfloat16: Whether it computes in bfloat16 by itself.
        count: How many there are.
    """

    def __init__(self, kind: str, name: str, *, bfloat16: bool, count: int = 1) -> None:
        self.kind, self.name, self.bfloat16, self.count = kind, name, bfloat16, count

    def install(self, patch: pytest.MonkeyPatch) -> torch.device:
        """Let torch answer as it would with this card; one that only emulates bfloat16 says so if it may."""
        for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            here = kind == self.kind
            patch.setattr(module, "is_available", lambda here=here: here)
            patch.setattr(module, "device_count", lambda here=here: self.count if here else 0)
            if here:
                patch.setattr(module, "device", nullcontext)
                patch.setattr(module, "get_device_name", lambda _: self.name)
                patch.setattr(
                    module, "is_bf16_supported", lambda including_emulation=True: including_emulation or self.bfloat16
                )
        patch.setattr(torch.backends.mps, "is_available", lambda: self.kind == "mps")
        return choose_device("auto")


A100 = Card("cuda", "NVIDIA A100-SXM4-80GB", bfloat16=True, count=2)
MI300 = Card("cuda", "AMD Instinct MI300X", bfloat16=True)
XPU = Card("xpu", "Intel(R) Data Center GPU Max 1550", bfloat16=True)
APPLE = Card("mps", "Apple silicon", bfloat16=True)


@pytest.mark.parametrize("card", [A100, MI300, XPU, APPLE], ids=lambda card: card.name)
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, card):
    assert card.install(monkeypatch) == torch.device(card.kind)
    assert gpu_names() == (["mps"] if card.kind == "mps" else [f"{card.kind}:{number}" for number in range(card.count)])
    assert choose_device("cpu") == CPU


def test_auto_is_the_cpu_where_there_is_none(monkeypatch):
    assert Card("none", "", bfloat16=False).install(monkeypatch) == CPU
    assert gpu_names() == []


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "tpu", "meta", "cpu cpu"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ConfigError, match="give auto, cpu, cuda, cuda:N, mps"):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda", "no GPU here; give cpu, or install a CUDA or ROCm build"),
        ("mps", "no GPU of Apple silicon here; give cpu"),
        ("xpu:0", "no Intel GPU here; give cpu, or install an XPU build"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, name, words):
    for other in (Card("none", "", bfloat16=False), A100, APPLE):
        if other.kind != name:
            other.install(monkeypatch)
            if not name.startswith(other.kind):
                with pytest.raises(ConfigError, match=words):
                    choose_device(name)


@pytest.mark.parametrize("card", [A100, XPU], ids=lambda card: card.kind)
def test_gpus_are_counted_from_0(monkeypatch, card):
    card.install(monkeypatch)
    with pytest.raises(ConfigError, match=rf"{card.count} GPU\(s\) here; count from 0"):
        choose_device(f"{card.kind}:{card.count}")
    assert choose_device(f"{card.kind}:0") == torch.device(f"{card.kind}:0")


class TestSeveralDevices:
    """One model over several GPUs; a plain list is one process for each, which a backbone is not."""

    def test_spread_is_all_gpus_or_those_listed(self, monkeypatch):
        A100.install(monkeypatch)
        assert choose_devices("spread") == (torch.device("cuda:0"), torch.device("cuda:1"))
        assert choose_devices("spread:cuda:1, cuda:0") == (torch.device("cuda:1"), torch.device("cuda:0"))
        assert choose_devices("cuda:1") == (torch.device("cuda:1"),)
        XPU.install(monkeypatch)
        assert choose_devices("spread") == (torch.device("xpu:0"),)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("cuda:0,cuda:1", "one process for each device, .* or spread:cuda:0,cuda:1 to divide one model"),
            ("spread:cuda:0,cpu", "devices of one kind"),
            ("spread:cuda:0,cuda:2", r"2 GPU\(s\) here"),
            ("spread:cuda:0,", "give auto, cpu"),
            ("spreads", "give auto, cpu"),
        ],
    )
    def test_other_lists_are_refused(self, monkeypatch, name, words):
        A100.install(monkeypatch)
        with pytest.raises(ConfigError, match=words):
            choose_devices(name)

    def test_without_a_gpu_there_is_nothing_to_spread_over(self, monkeypatch):
        Card("none", "", bfloat16=False).install(monkeypatch)
        with pytest.raises(ConfigError, match="no GPU here"):
            choose_devices("spread")

    def test_one_card_without_bfloat16_makes_it_float32(self, monkeypatch, caplog):
        pair = Card("cuda", "one of two", bfloat16=True, count=2)
        pair.install(monkeypatch)
        devices = choose_devices("spread")
        assert choose_dtype("auto", devices) == torch.bfloat16
        current = []
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device.index)))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 0)
        assert choose_dtype("auto", devices) == torch.float32
        assert ["one of two (cuda:1)" in message for message in caplog.messages] == [True]

    def test_the_fullest_one_decides_on_the_token_budget(self, tiny_backbone, monkeypatch):
        monkeypatch.setattr(devices, "free_memory", lambda device: 10**12 if device.index == 0 else 0)
        pair = [torch.device("cuda:0"), torch.device("cuda:1")]
        config = tiny_backbone.model.config
        assert devices.choose_token_budget(config, pair[:1], torch.float32) == 16384
        assert devices.choose_token_budget(config, pair, torch.float32) == 256


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
def test_auto_is_bfloat16_where_the_cpu_computes_in_it(monkeypatch, capabilities, wanted, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype("auto", [CPU]) == wanted
    assert not caplog.messages


@pytest.mark.parametrize("card", [A100, MI300, XPU], ids=lambda card: card.name)
def test_auto_is_bfloat16_where_the_gpu_computes_in_it(monkeypatch, card, caplog):
    assert choose_dtype("auto", [card.install(monkeypatch)]) == torch.bfloat16
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100-SXM2-16GB"])
def test_auto_is_float32_where_the_gpu_emulates_bfloat16_and_says_so_once(monkeypatch, kind, name, caplog):
    device = Card(kind, f"{name} of {kind}", bfloat16=False).install(monkeypatch)
    assert [choose_dtype("auto", [device]) for _ in range(3)] == [torch.float32] * 3
    (message,) = caplog.messages
    assert f"{name} of {kind} ({kind}) does not compute in bfloat16" in message
    assert "float32 is used" in message
    assert choose_dtype("bfloat16", [device]) == torch.bfloat16  # whoever names it gets it
    assert len(caplog.messages) == 1


def test_an_apple_gpu_without_bfloat16_computes_in_float32(monkeypatch, caplog):
    """Before macOS 14, torch refuses such tensors there."""

    def refuse(*_sizes, **_options):
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", refuse)
    device = torch.device("mps", 1)  # answers are kept for each device
    assert choose_dtype("auto", [device]) == torch.float32
    assert any("Apple silicon (mps:1) does not compute in bfloat16" in message for message in caplog.messages)
    with pytest.raises(ConfigError, match="macOS 14"):
        choose_dtype("bfloat16", [device])
    assert choose_dtype("float32", [device]) == torch.float32


def test_an_apple_gpu_with_bfloat16_computes_in_it(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, dtype, device: ones(*sizes, dtype=dtype) if device else None)
    device = torch.device("mps", 2)
    assert choose_dtype("auto", [device]) == choose_dtype("bfloat16", [device]) == torch.bfloat16


def test_auto_works_with_a_torch_that_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype("auto", [CPU]) == torch.float32


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_types_by_name_or_by_torch(given):
    assert choose_dtype(given, [CPU]) == torch.bfloat16


@pytest.mark.parametrize("given", ["float16", torch.float16, "int8", ""])
def test_other_types_are_refused(given):
    with pytest.raises(ConfigError, match="float16 overflows"):
        choose_dtype(given, [CPU])


class TestTokenBudget:
    """As many tokens at once as half of the free memory holds, within bounds."""

    @pytest.mark.parametrize(
        ("free", "device", "tokens"),
        [
            (10**12, "cpu", 2048),
            (10**12, "cuda", 16384),
            (10**12, "xpu", 16384),
            (10**12, "mps", 4096),
            (0, "mps", 256),
        ],
    )
    def test_it_stays_within_its_bounds(self, tiny_backbone, monkeypatch, free, device, tokens):
        monkeypatch.setattr(devices, "free_memory", lambda _: free)
        config = tiny_backbone.model.config
        assert devices.choose_token_budget(config, [torch.device(device)], torch.float32) == tokens

    def test_between_them_it_follows_the_memory(self, nano_checkpoint, monkeypatch):
        config = Backbone.load(nano_checkpoint[1], device="cpu").model.config
        budgets = []
        for free in (20_000_000, 40_000_000):
            monkeypatch.setattr(devices, "free_memory", lambda _, free=free: free)
            budgets.append(devices.choose_token_budget(config, [CPU], torch.bfloat16))
        assert 256 < budgets[0] < budgets[1] < 2048
        assert abs(budgets[1] - 2 * budgets[0]) <= 1

    def test_processes_share_what_is_free(self, tiny_backbone, monkeypatch):
        monkeypatch.setattr(devices, "free_memory", lambda _: 100_000_000)
        config = tiny_backbone.model.config
        alone, shared = (devices.choose_token_budget(config, [CPU], torch.float32, sharing=count) for count in (1, 3))
        assert 256 < shared < alone < 2048
        assert abs(alone - 3 * shared) <= 3

    @pytest.mark.parametrize(
        ("limit", "free"), [("5000000", 5_000_000 - 4_000_000 + 30_000), ("max", 10**7), ("", 10**7)]
    )
    def test_a_container_has_what_its_limit_leaves(self, monkeypatch, tmp_path, limit, free):
        monkeypatch.setattr(devices, "_CONTAINER", tmp_path)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**7))
        for name, content in (
            ("memory.max", limit),
            ("memory.current", "4000000"),
            ("memory.stat", "anon 7\nfile 90000\ninactive_file 10000\nactive_file 20000"),
        ):
            (tmp_path / name).write_text(f"{content}\n")
        assert free_memory(CPU) == free

    def test_free_memory_of_this_machine_is_a_sensible_number(self):
        assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


class TestMemory:
    """Free memory, and running out of it, by the questions that each kind of device answers."""

    @pytest.mark.parametrize("kind", ["cuda", "xpu"])
    def test_what_torch_keeps_for_reuse_is_free(self, monkeypatch, kind):
        module = getattr(torch, kind)
        monkeypatch.setattr(module, "memory_reserved", lambda _: 50)
        monkeypatch.setattr(module, "memory_allocated", lambda _: 20)
        monkeypatch.setattr(module, "mem_get_info", lambda _: (100, 1000))
        assert free_memory(torch.device(kind)) == 130

    def test_an_intel_gpu_that_does_not_tell_its_free_memory(self, monkeypatch):
        def refuse(_):
            raise RuntimeError("The device doesn't support querying its available free memory")

        monkeypatch.setattr(torch.xpu, "memory_reserved", lambda _: 50)
        monkeypatch.setattr(torch.xpu, "memory_allocated", lambda _: 20)
        monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
        assert free_memory(torch.device("xpu")) == 980

    @pytest.mark.parametrize(("available", "wanted"), [(10**6, 680), (300, 400)])
    def test_an_apple_gpu_shares_main_memory_up_to_a_limit(self, monkeypatch, available, wanted):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 700)
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 20)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 120)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        assert free_memory(torch.device("mps")) == wanted

    @pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
    def test_memory_is_given_back_by_the_device_that_has_it(self, monkeypatch, kind):
        emptied = []
        for other in ("cuda", "xpu", "mps"):
            monkeypatch.setattr(getattr(torch, other), "empty_cache", lambda other=other: emptied.append(other))
        release_memory(CPU)
        release_memory(torch.device(kind))
        assert emptied == [kind]

    @pytest.mark.parametrize(
        ("error", "is_one"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
            (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), True),
            (RuntimeError("MPS backend out of memory (MPS allocated: 5.44 GB, max allowed: 9.07 GB)"), True),
            (RuntimeError("Invalid buffer size: 17.54 GiB"), True),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        ],
    )
    def test_running_out_of_memory_is_recognised(self, error, is_one):
        assert is_out_of_memory(error) is is_one
