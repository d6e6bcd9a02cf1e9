"""The published checkpoints that docs/models.md lists, with the sizes that their configurations have.

What is not written here is as in transformers' defaults, or has no influence on the number of weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_QWEN2_VOCABULARY, _QWEN2_LARGE_VOCABULARY, _QWEN3_5_VOCABULARY = 151936, 152064, 248320


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One shape, under which one or several checkpoints were published.

    Attributes:
        family: The `model_type` of its configuration.
        title: What they are called on the hub, without "Qwen/".
        text: Of the `text_config`, all that decides on the number of weights.
        vision: Likewise of the `vision_config`.
        tied: Whether the embeddings are the language head too.
        published: Weights of the published files, language head included and layers that predict further tokens
            (`mtp.*`) left out; rounded to whole billions where only that is known.
    """

    family: str
    title: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool
    published: int

    @property
    def short(self) -> str:
        """The title without what is in brackets, of several the last: it is the newest."""
        return re.sub(r" \(.*?\)", "", self.title).split(", ")[-1]


def _text(hidden: int, layers: int, intermediate: int, heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": _QWEN2_VOCABULARY,
        **more,
    }


def _hybrid(
    hidden: int, layers: int, intermediate: int, heads: int, key_heads: int, linear_heads: int, **more: Any
) -> dict[str, Any]:
    """Return the decoder of Qwen3.5: three layers of linear attention, one of full attention, and so on."""
    return _text(
        hidden,
        layers,
        intermediate,
        heads,
        key_heads,
        vocab_size=_QWEN3_5_VOCABULARY,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=linear_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * (layers // 4),
        **more,
    )


def _experts(count: int, chosen: int, intermediate: int, **more: int) -> dict[str, int]:
    return {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": intermediate, **more}


def _vision(
    depth: int, hidden: int, intermediate: int, heads: int, out: int, deepstack: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Return the vision tower of Qwen3-VL and Qwen3.5."""
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_heads": heads,
        "out_hidden_size": out,
        "num_position_embeddings": 2304,
        **({"deepstack_visual_indexes": list(deepstack)} if deepstack else {}),
    }


def _qwen2_vision(out: int) -> dict[str, Any]:
    return {"depth": 32, "embed_dim": 1280, "hidden_size": out, "mlp_ratio": 4, "num_heads": 16}


def _qwen2_5_vision(intermediate: int, out: int) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": intermediate,
        "num_heads": 16,
        "out_hidden_size": out,
    }


_LARGE = {"vocab_size": _QWEN2_LARGE_VOCABULARY}
_SMALL_TOWER, _LARGE_TOWER = (24, 1024, 4096, 16), (27, 1152, 4304, 16)
_SMALL_STACK, _LARGE_STACK = (5, 11, 17), (8, 16, 24)

CHECKPOINTS = (
    Checkpoint(
        "qwen2_vl",
        "Qwen2-VL-2B",
        _text(1536, 28, 8960, 12, 2),
        _qwen2_vision(1536),
        tied=True,
        published=2_208_985_600,
    ),
    Checkpoint(
        "qwen2_vl",
        "Qwen2-VL-7B",
        _text(3584, 28, 18944, 28, 4, **_LARGE),
        _qwen2_vision(3584),
        tied=False,
        published=8_291_375_616,
    ),
    Checkpoint(
        "qwen2_vl",
        "Qwen2-VL-72B",
        _text(8192, 80, 29568, 64, 8, **_LARGE),
        _qwen2_vision(8192),
        tied=False,
        published=73_405_560_320,
    ),
    Checkpoint(
        "qwen2_5_vl",
        "Qwen2.5-VL-3B",
        _text(2048, 36, 11008, 16, 2),
        _qwen2_5_vision(3420, 2048),
        tied=True,
        published=3_754_622_976,
    ),
    Checkpoint(
        "qwen2_5_vl",
        "Qwen2.5-VL-7B",
        _text(3584, 28, 18944, 28, 4, **_LARGE),
        _qwen2_5_vision(3420, 3584),
        tied=False,
        published=8_292_166_656,
    ),
    Checkpoint(
        "qwen2_5_vl",
        "Qwen2.5-VL-32B",
        _text(5120, 64, 27648, 40, 8, **_LARGE),
        _qwen2_5_vision(3456, 5120),
        tied=False,
        published=33_452_718_336,
    ),
    Checkpoint(
        "qwen2_5_vl",
        "Qwen2.5-VL-72B",
        _text(8192, 80, 29568, 64, 8, **_LARGE),
        _qwen2_5_vision(3456, 8192),
        tied=False,
        published=73_000_000_000,
    ),
    Checkpoint(
        "qwen3_vl",
        "Qwen3-VL-2B (Instruct, Thinking, Embedding, Reranker)",
        _text(2048, 28, 6144, 16, 8, head_dim=128),
        _vision(*_SMALL_TOWER, 2048, _SMALL_STACK),
        tied=True,
        published=2_127_532_032,
    ),
    Checkpoint(
        "qwen3_vl",
        "Qwen3-VL-4B (Instruct, Thinking)",
        _text(2560, 36, 9728, 32, 8, head_dim=128),
        _vision(*_SMALL_TOWER, 2560, _SMALL_STACK),
        tied=True,
        published=4_437_815_808,
    ),
    Checkpoint(
        "qwen3_vl",
        "Qwen3-VL-8B (Instruct, Thinking, Embedding, Reranker)",
        _text(4096, 36, 12288, 32, 8, head_dim=128),
        _vision(*_LARGE_TOWER, 4096, _LARGE_STACK),
        tied=False,
        published=8_767_123_696,
    ),
    Checkpoint(
        "qwen3_vl",
        "Qwen3-VL-32B (Instruct, Thinking)",
        _text(5120, 64, 25600, 64, 8, head_dim=128),
        _vision(*_LARGE_TOWER, 5120, _LARGE_STACK),
        tied=False,
        published=33_357_390_064,
    ),
    Checkpoint(
        "qwen3_vl_moe",
        "Qwen3-VL-30B-A3B (Instruct, Thinking)",
        _text(2048, 48, 6144, 32, 4, head_dim=128, **_experts(128, 8, 768)),
        _vision(*_LARGE_TOWER, 2048, _LARGE_STACK),
        tied=False,
        published=31_070_754_032,
    ),
    Checkpoint(
        "qwen3_vl_moe",
        "Qwen3-VL-235B-A22B (Instruct, Thinking)",
        _text(4096, 94, 12288, 64, 4, head_dim=128, **_experts(128, 8, 1536)),
        _vision(*_LARGE_TOWER, 4096, _LARGE_STACK),
        tied=False,
        published=235_670_022_896,
    ),
    Checkpoint(
        "qwen3_5",
        "Qwen3.5-0.8B (also Base)",
        _hybrid(1024, 24, 3584, 8, 2, 16),
        _vision(12, 768, 3072, 12, 1024),
        tied=True,
        published=852_985_920,
    ),
    Checkpoint(
        "qwen3_5",
        "Qwen3.5-2B (also Base)",
        _hybrid(2048, 24, 6144, 8, 2, 16),
        _vision(*_SMALL_TOWER, 2048),
        tied=True,
        published=2_213_241_664,
    ),
    Checkpoint(
        "qwen3_5",
        "Qwen3.5-4B (also Base)",
        _hybrid(2560, 32, 9216, 16, 4, 32),
        _vision(*_SMALL_TOWER, 2560),
        tied=True,
        published=4_539_265_536,
    ),
    Checkpoint(
        "qwen3_5",
        "Qwen3.5-9B (also Base)",
        _hybrid(4096, 32, 12288, 16, 4, 32),
        _vision(*_LARGE_TOWER, 4096),
        tied=False,
        published=9_409_813_744,
    ),
    Checkpoint(
        "qwen3_5",
        "Qwen3.5-27B, Qwen3.6-27B, Qwen3.8-27B",
        _hybrid(5120, 64, 17408, 24, 4, 48),
        _vision(*_LARGE_TOWER, 5120),
        tied=False,
        published=27_356_728_560,
    ),
    Checkpoint(
        "qwen3_5_moe",
        "Qwen3.5-35B-A3B (also Base), Qwen3.6-35B-A3B",
        _hybrid(2048, 40, 512, 16, 2, 32, **_experts(256, 8, 512, shared_expert_intermediate_size=512)),
        _vision(*_LARGE_TOWER, 2048),
        tied=False,
        published=35_107_181_936,
    ),
    Checkpoint(
        "qwen3_5_moe",
        "Qwen3.5-122B-A10B",
        _hybrid(3072, 48, 1024, 32, 2, 64, **_experts(256, 8, 1024, shared_expert_intermediate_size=1024)),
        _vision(*_LARGE_TOWER, 3072),
        tied=False,
        published=125_000_000_000,
    ),
    Checkpoint(
        "qwen3_5_moe",
        "Qwen3.5-397B-A17B",
        _hybrid(4096, 60, 1024, 32, 2, 64, **_experts(512, 10, 1024, shared_expert_intermediate_size=1024)),
        _vision(*_LARGE_TOWER, 4096),
        tied=False,
        published=396_802_360_816,
    ),
)
