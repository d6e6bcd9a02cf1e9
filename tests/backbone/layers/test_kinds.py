"""How many layers of which kinds there are, in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from qwen_vl_classifier.backbone.layers.kinds import describe_layers


def layer(kind: str, *, experts: bool = False) -> nn.Module:
    made = nn.Module()
    made.add_module("linear_attn" if kind == "linear" else "self_attn", nn.Identity())
    made.mlp = nn.Module()
    if experts:
        made.mlp.experts = nn.Identity()
    return made


ONE_KIND = [layer("full") for _ in range(28)]
HYBRID = [layer("full" if number % 4 == 3 else "linear") for number in range(24)]
EXPERTS = [layer("full" if number % 4 == 3 else "linear", experts=True) for number in range(40)]
SOME_EXPERTS = [layer("full", experts=number % 2 == 1) for number in range(4)]


@pytest.mark.parametrize(
    ("layers", "total", "shared", "expected"),
    [
        (ONE_KIND, 28, 0, "28: full attention"),
        (ONE_KIND[:20], 28, 0, "20 of 28: full attention"),
        (HYBRID, 24, 0, "24: 18 linear attention (Gated DeltaNet), 6 full attention"),
        (HYBRID[:3], 24, 0, "3 of 24: linear attention (Gated DeltaNet)"),
        (
            EXPERTS,
            40,
            512,
            "40: 30 linear attention (Gated DeltaNet), 10 full attention; 256 experts, 8 per token and a shared one",
        ),
        (SOME_EXPERTS, 4, 0, "4: full attention; 256 experts in 2 layers, 8 per token"),
    ],
)
def test_kinds_of_layers_are_counted(layers, total, shared, expected):
    config = SimpleNamespace(num_experts=256, num_experts_per_tok=8, shared_expert_intermediate_size=shared)
    assert describe_layers(layers, total, config) == expected
