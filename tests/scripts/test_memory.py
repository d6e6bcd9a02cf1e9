"""The formula of docs/models.md against what models take, and the page against the formula."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.backbone.packing import PackedBatch, pack
from qwen_vl_classifier.backbone.towers import train_towers
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
TAP = Tap(-1, "mean")
RANK = 4


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Let the modules of the scripts be imported, as a script there does."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def memory() -> ModuleType:
    import memory

    return memory


@pytest.fixture
def formula() -> ModuleType:
    import memory_formula

    return memory_formula


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A nano checkpoint of each family."""
    root = tmp_path_factory.mktemp("nano")
    return {family: nano.make_checkpoint(family, root / family) for family in nano.FAMILIES}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of 59 million weights, in which pictures weigh little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        from checkpoints import SHAPES, write_checkpoint

        return write_checkpoint(SHAPES["59m"], tmp_path_factory.mktemp("small") / "59m")


# The page


def smallest_of_each_family(checkpoints):
    first = {checkpoint.family: checkpoint for checkpoint in reversed(checkpoints)}
    assert first.keys() == FAMILIES.keys()
    return [*first.values()]


def check_sizes(formula, checkpoints):
    """The exact number where it is known; rounded ones count layers that are not loaded."""
    for checkpoint in checkpoints:
        text = checkpoint.text
        head = 0 if checkpoint.tied else text["vocab_size"] * text["hidden_size"]
        found = formula.count(formula.build(checkpoint)) + head
        rounded = checkpoint.published % 10**9 == 0
        assert found == pytest.approx(checkpoint.published, rel=0.025 if rounded else 0), checkpoint.title


def test_page_and_published_sizes_of_each_family(memory, formula):
    checkpoints = smallest_of_each_family(memory.CHECKPOINTS)
    check_sizes(formula, checkpoints)
    lines = memory.DOCUMENT.read_text(encoding="utf-8").splitlines()
    computed = memory.tables(checkpoints)
    for line in computed["loading"] + computed["training"]:
        assert line in lines, f"{line}\nrun: python scripts/memory.py --write"


@pytest.mark.soak
def test_whole_page_and_all_published_sizes(memory, formula, capsys):
    check_sizes(formula, memory.CHECKPOINTS)
    text = memory.DOCUMENT.read_text(encoding="utf-8")
    assert memory.filled(text, memory.tables()) == text, "run: python scripts/memory.py --write"
    assert memory.main([]) == 0
    assert "\n".join(memory.tables()["gpus"]) in capsys.readouterr().out


def test_a_gpu_is_not_filled_to_the_brim(memory):
    gib = 2**30
    assert memory.smallest_gpu(7 * gib) == "8"
    assert memory.smallest_gpu(int(7.5 * gib)) == "12"
    assert memory.smallest_gpu(140 * gib) == "–"


# Weights


def held(model: nn.Module) -> int:
    """Bytes of a model's weights, with the scales of quantised ones."""
    tensors = []
    for weight in model.parameters():
        tensors += [weight.data, getattr(weight, "SCB", None)]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor is not None}.values())


@pytest.mark.parametrize("family", nano.FAMILIES)
def test_weights_take_what_the_formula_says(folders, family, formula):
    folder = folders[family]
    plain = Backbone.load(folder, device="cpu", dtype="bfloat16").model
    sizes = {way: formula.weight_bytes(plain, way) for way in (None, "8bit", "4bit")}
    assert held(plain) == sizes[None] > sizes["8bit"] > sizes["4bit"]
    for way in ("8bit", "4bit"):
        assert held(Backbone.load(folder, device="cpu", dtype="bfloat16", quantization=way).model) == sizes[way]


# Passes


class LiveTensors(TorchDispatchMode):
    """Count the bytes of tensors that are alive, and the most there were.

    Args:
        known: Tensors that are not counted.
    """

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, identity: int, size: int) -> None:
        self.storages.discard(identity)
        self.now -= size


def packed(backbone: Backbone, example: Example) -> PackedBatch:
    return pack(backbone.processor, backbone.prepare([example]), ((0,),), backbone.device, backbone.dtype)


def picture(side: int) -> Example:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Example(Image.fromarray(pixels), "It is red.")


def check_reading(folder, formula, quantization, *, side, low, high):
    plain = Backbone.load(folder, device="cpu", dtype="bfloat16").model
    backbone = Backbone.load(folder, device="cpu", dtype="bfloat16", quantization=quantization)
    batch = packed(backbone, picture(side))
    assert batch.pixel_values is not None
    with LiveTensors(iter([*backbone.model.parameters(), batch.pixel_values])) as live, torch.inference_mode():
        live.now = batch.pixel_values.nbytes
        pooled_states(backbone.model, batch, [TAP])
    passes = formula.reading_bytes(plain, quantization, batch.input_ids.numel())
    ratio = (passes - formula.weight_bytes(plain, quantization)) / live.peak
    assert low <= ratio <= high


@pytest.mark.soak
@pytest.mark.parametrize("family", nano.FAMILIES)
@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_reading_takes_about_what_the_formula_says(folders, family, formula, quantization):
    check_reading(folders[family], formula, quantization, side=420, low=0.95, high=1.2)


@pytest.mark.soak
@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_reading_with_a_small_model_takes_about_what_the_formula_says(small, formula, quantization):
    check_reading(small, formula, quantization, side=896, low=0.95, high=1.15)


# Training


def trainable(folder: Path, method: str) -> Backbone:
    """A backbone in training, without the adapters' dropout, whose mask is larger on CPUs."""
    backbone = Backbone.load(folder, device="cpu", dtype="bfloat16" if method == "lora" else "float32")
    if method == "lora":
        add_adapter(backbone, towers="llm", tap=TAP, rank=RANK, alpha=8)
    else:
        train_towers(backbone, "llm", TAP)
    backbone.model.train()
    return backbone


def kept(backbone: Backbone, batch: PackedBatch) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in backbone.model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = pooled_states(backbone.model, batch, [TAP])
    assert states.requires_grad
    return sum(size for size, _ in found.values())


def check_kept(folder, formula, method, *, low, high):
    plain = Backbone.load(folder, device="cpu", dtype="bfloat16")
    backbone = trainable(folder, method)
    batch = packed(backbone, Example(None, "word " * 512))  # attention on CPUs differs for fewer tokens
    by_layer = formula.kept_bytes(plain.model, RANK if method == "lora" else None, dropout=False)
    last_norm = (12 if method == "lora" else 16) * plain.hidden_size
    expected = batch.input_ids.numel() * (sum(by_layer) + last_norm)
    assert low <= expected / kept(backbone, batch) <= high


@pytest.mark.parametrize("family", [family for family in nano.FAMILIES if family not in nano.HYBRID])
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_a_pass_keeps_what_the_formula_says(folders, family, formula, method):
    check_kept(folders[family], formula, method, low=0.99, high=1.05)


@pytest.mark.parametrize("family", nano.HYBRID)
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_a_pass_with_linear_attention_keeps_about_what_the_formula_says(folders, family, formula, method):
    check_kept(folders[family], formula, method, low=0.9, high=1.15)


def step_peak(backbone: Backbone, batch: PackedBatch) -> int:
    """Most bytes alive in the second step of AdamW, with two passes in it, weights left out."""
    optimizer = torch.optim.AdamW(
        (weight for weight in backbone.model.parameters() if weight.requires_grad), fused=True
    )
    assert batch.pixel_values is not None
    with LiveTensors(iter([*backbone.model.parameters(), batch.pixel_values])) as live:
        live.now = batch.pixel_values.nbytes
        for _ in range(2):
            live.peak = live.now
            for _ in range(2):
                pooled_states(backbone.model, batch, [TAP]).sum().backward()
            optimizer.step()
            peak = live.peak
            optimizer.zero_grad()
    return peak


def check_step(folder, formula, method, *, checkpointing, side, low, high):
    plain = Backbone.load(folder, device="cpu", dtype="bfloat16").model
    backbone = trainable(folder, method)
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    batch = packed(backbone, picture(side))
    tokens = batch.input_ids.numel()
    if method == "lora":
        need = formula.adapter_bytes(plain, checkpointing=checkpointing, rank=RANK, tokens=tokens)
        states = need.states - 4 * formula.adapter_weights(plain, RANK)
    else:
        need = formula.full_bytes(plain, checkpointing=checkpointing, tokens=tokens)
        states = need.states
    ratio = (states + need.passes) / step_peak(backbone, batch)
    assert low <= ratio <= high


METHODS = pytest.mark.parametrize("method", ["lora", "full"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])


def test_a_step_takes_what_the_formula_says(folders, formula):
    check_step(folders["qwen3_5_moe"], formula, "lora", checkpointing=False, side=280, low=0.85, high=1.4)


@pytest.mark.soak
@pytest.mark.parametrize("family", nano.FAMILIES)
@METHODS
@CHECKPOINTING
def test_a_step_of_any_family_takes_what_the_formula_says(folders, family, formula, method, checkpointing):
    check_step(folders[family], formula, method, checkpointing=checkpointing, side=420, low=0.85, high=1.4)


@pytest.mark.soak
@METHODS
@CHECKPOINTING
def test_a_step_of_a_small_model_takes_what_the_formula_says(small, formula, method, checkpointing):
    check_step(small, formula, method, checkpointing=checkpointing, side=896, low=0.95, high=1.6)
