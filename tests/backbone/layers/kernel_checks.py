"""The operators of GPUs compared with transformers' own modules: by Triton's interpreter on CPUs, or on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from qwen_vl_classifier.backbone.layers import fused
from qwen_vl_classifier.backbone.layers.attention import use_faster_attention
from qwen_vl_classifier.backbone.layers.joined import join_layers
from qwen_vl_classifier.backbone.layers.operators import Operators
from tests.backbone.layers.hybrid import HIDDEN, as_model, decoder, run_layers


class Comparison:
    """The largest difference of each result from what is wanted, as a share of the largest value."""

    def __init__(self, operators: Operators, device: str, dtype: torch.dtype) -> None:
        self.operators, self.device, self.dtype = operators, device, dtype
        self.errors: dict[str, float] = {}
        self.generator = torch.Generator().manual_seed(0)

    def drawn(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator).to(self.device, self.dtype)

    def module(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=self.generator) / parameter.shape[-1] ** 0.5
        return module.to(self.device, self.dtype)

    def norm(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=self.generator)
        return module.to(self.device, self.dtype)

    def record(self, name: str, seen: Tensor, wanted: Tensor) -> None:
        assert seen.dtype == wanted.dtype
        assert seen.shape == wanted.shape
        self.errors[name] = ((seen.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()

    def compare(self, *, layers: bool = True) -> dict[str, float]:
        """Compare each operator, and whole layers, which take longest in the interpreter."""
        with torch.inference_mode():
            self.compare_norms()
            self.compare_gates()
            self.compare_rotations()
            if layers:
                self.compare_layers()
        return self.errors

    def compare_norms(self) -> None:
        for width in (1280, 2048):
            norm, states, residual = (
                self.norm(qwen2_5.Qwen2_5_VLRMSNorm(width)),
                self.drawn(9, width),
                self.drawn(9, width),
            )
            total, seen = self.operators.add_and_normalise(states, None, residual, norm)
            self.record("sum", total, states + residual)
            self.record(f"rms norm, {width}", seen, norm(states + residual))
        strip = self.drawn(2, 5, 9 * 32)
        norm = self.norm(qwen2_5.Qwen2_5_VLRMSNorm(32))
        keys = strip[..., 6 * 32 : 8 * 32].view(2, 5, 2, 32)
        seen = self.operators.normalise(keys, norm.weight, norm.variance_epsilon)
        self.record("rms norm, heads in a strip", seen, norm(keys))
        norm = self.norm(qwen3_5.Qwen3_5RMSNorm(32))
        queries = strip[..., : 6 * 32].view(2, 5, 3, 2, 32).unbind(3)[0]
        seen = self.operators.normalise(queries, norm.weight, norm.eps, centred=True)
        self.record("rms norm, centred, heads beside gates", seen, norm(queries))
        states, residual = self.drawn(3, 3, 1280), self.drawn(3, 3, 1280)
        norm = self.norm(qwen3_5.Qwen3_5RMSNorm(1280))
        _, seen = self.operators.add_and_normalise(states, None, residual, norm)
        self.record("rms norm, centred", seen, norm(states + residual))
        norm, states, gate = self.norm(qwen3_5.Qwen3_5RMSNormGated(24)), self.drawn(50, 24), self.drawn(50, 24)
        seen = self.operators.normalise_with_gate(states, gate, norm.weight, norm.variance_epsilon)
        self.record("rms norm, gated", seen, norm(states, gate))
        norm, states, residual = self.norm(nn.LayerNorm(1152, eps=1e-6)), self.drawn(9, 1152), self.drawn(9, 1152)
        _, seen = self.operators.add_and_normalise(states, None, residual, norm)
        self.record("layer norm, 1152", seen, norm(states + residual))

    def compare_gates(self) -> None:
        activation = nn.SiLU()
        for name, halves in (("halves", True), ("apart", False)):
            gate, up = (
                self.drawn(9, 2, 2 * 1100).chunk(2, dim=-1) if halves else (self.drawn(18, 72), self.drawn(18, 72))
            )
            seen = self.operators.multiply_gate(gate, up, activation)
            self.record(f"silu and multiply, {name}", seen, activation(gate) * up)

        layer, states = self.module(nn.Linear(72, 130)), self.drawn(9, 2, 72)
        seen = self.operators.activate(states, layer, ACT2FN["quick_gelu"])
        self.record("quick GELU", seen, ACT2FN["quick_gelu"](layer(states)))

    def compare_rotations(self) -> None:
        for head in (80, 72):
            query, key, _ = self.drawn(9, 3, 5, head).unbind(1)
            rotary = self.angles(9, head, torch.float32)
            seen = torch.cat(self.operators.rotate(query, key, rotary))
            self.record(f"rotary, {head}", seen, torch.cat(qwen2_5.apply_rotary_pos_emb_vision(query, key, *rotary)))
        for name, head, angles in (("decoder, shared keys", 128, 128), ("a quarter", 96, 24)):
            strip = self.drawn(2, 5, 8 * head)
            query, key = strip[..., : 5 * head].view(2, 5, 5, head), strip[..., 5 * head : 7 * head].view(2, 5, 2, head)
            rotary = self.angles(10, angles, self.dtype)
            rotary = tuple(part.view(2, 5, angles) for part in rotary)
            seen = torch.cat(self.operators.rotate(query, key, rotary), dim=2)
            wanted = qwen3_5.apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=2)
            self.record(f"rotary, {name}", seen, torch.cat(wanted, dim=2))

    def angles(self, tokens: int, angles: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        turns = torch.randn(tokens, angles // 2, generator=self.generator).repeat(1, 2)
        return turns.cos().to(self.device, dtype), turns.sin().to(self.device, dtype)

    def compare_layers(self) -> None:
        config = qwen2_5.Qwen2_5_VLVisionConfig(hidden_size=48, intermediate_size=37, num_heads=3)
        config._attn_implementation = "sdpa"
        text, block = (decoder("Qwen3_5").to(self.device, self.dtype) for _ in range(2)), self.block(config)
        plain, ours = text
        model = as_model(ours)
        model.visual.blocks = nn.ModuleList([self.block(config)])
        model.visual.blocks[0].load_state_dict(block.state_dict())
        use_faster_attention(model)
        fused.fuse_layers(model)
        join_layers(model)
        fused.operators_for = lambda *_: self.operators
        patches = self.drawn(11, 48)
        starts = torch.tensor([0, 4, 11], dtype=torch.int32, device=self.device)
        options = {"cu_seqlens": starts, "position_embeddings": self.angles(11, 16, torch.float32)}
        self.record("a vision block, joined", model.visual.blocks[0](patches, **options), block(patches, **options))
        states = self.drawn(1, 3, HIDDEN)
        positions = torch.arange(3, device=self.device).expand(1, 3)
        masks = {"full": None, "linear": None}
        seen, wanted = (run_layers(each, states, positions, masks) for each in (ours, plain))
        self.record("a decoder, joined", seen, wanted)

    def block(self, config: qwen2_5.Qwen2_5_VLVisionConfig) -> nn.Module:
        return self.module(qwen2_5.Qwen2_5_VLVisionBlock(config, "sdpa")).eval()
