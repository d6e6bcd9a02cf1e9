"""Which weights train: by towers and tap, in every family; and what a frozen tower costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.towers import TOWERS, linear_layers, train_towers
from qwen_vl_classifier.errors import ConfigError
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = Tap(-1, "mean")
SECOND = Tap(2, "mean")
NEWER = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
VISION_LINEAR = {
    "qwen2_vl": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
    "qwen2_5_vl": {"attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    **{family: {"attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"} for family in NEWER},
}
MERGERS = {
    "qwen2_vl": {"visual.merger.mlp.0", "visual.merger.mlp.2"},
    "qwen2_5_vl": {"visual.merger.mlp.0", "visual.merger.mlp.2"},
    **{family: {"visual.merger.linear_fc1", "visual.merger.linear_fc2"} for family in NEWER},
}
DEEPSTACK = {f"visual.deepstack_merger_list.{level}.linear_fc{number}" for level in (0, 1) for number in (1, 2)}
MERGERS |= {family: MERGERS[family] | DEEPSTACK for family in ("qwen3_vl", "qwen3_vl_moe")}
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
LINEAR_ATTENTION = {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED_EXPERT = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
DECODER_LINEAR = {
    "qwen3_vl_moe": ATTENTION,
    "qwen3_5": LINEAR_ATTENTION | MLP,
    "qwen3_5_moe": LINEAR_ATTENTION | SHARED_EXPERT,
}
"""Of the first three layers, where others than attention and MLP."""
LEFT_OUT = {
    "qwen3_5": {"linear_attn.in_proj_a", "linear_attn.in_proj_b"},
    "qwen3_5_moe": {"linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.shared_expert_gate"},
}


@pytest.fixture
def backbone(nano_checkpoint) -> Backbone:
    return Backbone.load(nano_checkpoint[1], device="cpu", dtype="float32")


def training(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def decoder_layers(names: set[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in names if name.startswith("language_model.layers.")}


def gradients(backbone: Backbone, inputs: dict[str, Tensor], tap: Tap = LAST) -> dict[str, Tensor]:
    """Gradients of a loss that every feature enters."""
    backbone.model.train()
    backbone.model.zero_grad()
    torch.manual_seed(0)
    features = backbone.encode_batch(inputs, [tap])
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    backbone.model.eval()
    return {name: weight.grad.clone() for name, weight in backbone.model.named_parameters() if weight.grad is not None}


class TestTrainTowers:
    """Full fine-tuning: exactly these weights have gradients."""

    @pytest.mark.parametrize(("tap", "depth"), [(LAST, 4), (SECOND, 2)], ids=str)
    def test_the_decoder_down_to_the_tap(self, backbone, tap, depth):
        train_towers(backbone, "llm", tap)
        names = training(backbone.model)
        assert decoder_layers(names) == set(range(depth))
        others = {name for name in names if not name.startswith("language_model.layers.")}
        assert others == ({"language_model.norm.weight"} if tap is LAST else set())
        assert all(
            name in names
            for name, _ in backbone.model.named_parameters()
            if name.startswith(tuple(f"language_model.layers.{number}." for number in range(depth)))
        )

    def test_the_blocks_of_the_vision_tower_too(self, backbone):
        train_towers(backbone, "llm", SECOND)
        decoder = training(backbone.model)
        train_towers(backbone, "llm+vision", SECOND)
        added = training(backbone.model) - decoder
        blocks = {name for name, _ in backbone.model.named_parameters() if name.startswith("visual.blocks.")}
        assert added == blocks
        assert blocks

    def test_everything_that_is_read(self, backbone, scene_rows):
        train_towers(backbone, "all", LAST)
        everything = {name for name, _ in backbone.model.named_parameters()}
        assert training(backbone.model) == everything
        assert set(gradients(backbone, backbone.processor(scene_rows[:2]))) == everything
        train_towers(backbone, "all", SECOND)
        above = ("language_model.layers.2.", "language_model.layers.3.", "language_model.norm.")
        late = ("visual.deepstack_merger_list.1.",)  # of Qwen3-VL: added behind the second layer
        unread = {name for name in everything if name.startswith(above + late)}
        assert everything - training(backbone.model) == unread

    def test_each_choice_takes_the_place_of_the_one_before(self, backbone):
        train_towers(backbone, "all", LAST)
        train_towers(backbone, "llm", Tap(1, "last"))
        assert decoder_layers(training(backbone.model)) == {0}
        assert not any(name.startswith("visual.") for name in training(backbone.model))

    def test_gradients_reach_exactly_what_trains(self, backbone, scene_rows):
        inputs = backbone.processor(scene_rows[:2])
        for towers in TOWERS:
            for tap in (SECOND, Tap(2, "mean", normed=True)):  # the latter reads the norm, and what is added before it
                train_towers(backbone, towers, tap)
                assert set(gradients(backbone, inputs, tap)) == training(backbone.model), (towers, tap)

    def test_a_choice_that_is_none(self, backbone):
        with pytest.raises(ConfigError, match=r"towers 'vision': expected one of llm, llm\+vision, all"):
            train_towers(backbone, "vision", LAST)
        with pytest.raises(ConfigError, match="towers ''"):
            linear_layers(backbone.model, "", LAST)
        with pytest.raises(ConfigError, match="4 layers loaded"):
            train_towers(backbone, "llm", Tap(5, "mean"))


class TestLinearLayers:
    """What adapters attach to, by full names."""

    def test_names_by_family(self, nano_checkpoint, backbone):
        family, _ = nano_checkpoint
        depth = len(backbone.model.visual.blocks)
        names = DECODER_LINEAR.get(family, ATTENTION | MLP)
        decoder = {f"language_model.layers.{number}.{name}" for number in range(2) for name in names}
        vision = {f"visual.blocks.{number}.{name}" for number in range(depth) for name in VISION_LINEAR[family]}
        assert set(linear_layers(backbone.model, "llm", SECOND)) == decoder
        assert set(linear_layers(backbone.model, "llm+vision", SECOND)) == decoder | vision
        mergers = {name for name in MERGERS[family] if "list.1" not in name}  # which the tap does not read
        assert set(linear_layers(backbone.model, "all", SECOND)) == decoder | vision | mergers
        assert MERGERS[family] < set(linear_layers(backbone.model, "all", Tap(3, "mean")))
        if family in nano.HYBRID:
            last = {name for name in linear_layers(backbone.model, "llm", LAST) if ".layers.3." in name}
            assert last == {f"language_model.layers.3.{name}" for name in ATTENTION | names - LINEAR_ATTENTION}

    def test_all_of_all_are_all_there_are(self, nano_checkpoint, backbone):
        names = linear_layers(backbone.model, "all", LAST)
        assert len(names) == len(set(names))
        gates = tuple(LEFT_OUT.get(nano_checkpoint[0], ()))
        linear = {name for name, module in backbone.model.named_modules() if isinstance(module, nn.Linear)}
        assert set(names) == {name for name in linear if not name.endswith(gates)}
        # Few outputs: one for each head, or one.
        assert all(backbone.model.get_submodule(name).out_features <= 4 for name in linear - set(names))
        assert len({name.partition(".")[2].split(".", 2)[-1] for name in linear - set(names)}) == len(gates)


class TestFrozenTower:
    """A vision tower that does not train builds no graph, and changes no gradient."""

    @pytest.fixture
    def backbone(self, kind_checkpoint) -> Backbone:
        return Backbone.load(kind_checkpoint[1], device="cpu", dtype="float32")

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_no_graph_is_built(self, backbone, scene_rows, checkpointing):
        seen: list[bool] = []

        def watched(tower, arguments, output):
            levels = getattr(output, "deepstack_features", None) or ()
            seen.extend(part.requires_grad for part in (output.pooler_output, *levels))

        backbone.model.visual.register_forward_hook(watched)
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        entering: list[bool] = []
        backbone.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, arguments: entering.append(arguments[0].requires_grad)
        )
        inputs = backbone.processor(scene_rows[:2])
        for towers, expected in (("llm", False), ("llm+vision", True)):
            seen.clear()
            entering.clear()
            train_towers(backbone, towers, LAST)
            gradients(backbone, inputs)
            assert set(seen) == {expected}
            assert set(entering) == {expected}

    def test_the_decoder_has_the_gradients_that_it_had(self, backbone, scene_rows):
        inputs = backbone.processor(scene_rows[:3])
        train_towers(backbone, "llm", LAST)
        seen = gradients(backbone, inputs)
        backbone.model.visual.requires_grad_(True)
        wanted = gradients(backbone, inputs)
        assert all(name.startswith("visual.") for name in wanted.keys() - seen.keys())
        largest = max(float(gradient.abs().max()) for gradient in seen.values())
        for name, gradient in ((name, wanted[name]) for name in seen):
            assert (seen[name] - gradient).abs().max() <= 1e-5 * largest, name


class TestCheckpointing:
    """Less memory, the same gradients, whatever is frozen."""

    @pytest.fixture
    def backbone(self, kind_checkpoint) -> Backbone:
        return Backbone.load(kind_checkpoint[1], device="cpu", dtype="float32")

    @pytest.mark.parametrize("towers", TOWERS)
    def test_gradients_are_the_same(self, backbone, scene_rows, towers):
        inputs = backbone.processor(scene_rows[:3])
        train_towers(backbone, towers, LAST)
        wanted = gradients(backbone, inputs)
        backbone.enable_gradient_checkpointing()
        runs: list[int] = []
        for layer in backbone.model.language_model.layers:  # a layer that is checkpointed runs twice
            layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        seen = gradients(backbone, inputs)
        assert len(runs) == 2 * backbone.num_layers
        assert seen.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(seen[name], gradient, rtol=0, atol=0)

    def test_encoding_goes_on_as_before(self, backbone, scene_rows):
        wanted = backbone.encode(scene_rows[:4], [LAST])
        backbone.enable_gradient_checkpointing()
        train_towers(backbone, "llm", LAST)
        assert (backbone.encode(scene_rows[:4], [LAST]) == wanted).all()
