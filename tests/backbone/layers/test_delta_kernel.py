"""The way to the kernel for GPUs: without a GPU, a double takes its place, with its arguments and by the definition."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from qwen_vl_classifier.backbone.layers import delta_rule
from qwen_vl_classifier.backbone.layers.delta_kernel import is_right, kernel_for, run_kernel
from qwen_vl_classifier.backbone.layers.delta_rule import StateSharing, gated_delta_rule
from tests.backbone.layers.delta_definition import by_definition, drawn, drawn_states

OWNERS = torch.tensor([1, 1, 0])
SHARING = StateSharing(OWNERS, ((torch.tensor([1]), 2), (torch.tensor([0]), 1)))


def double(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Take what `chunk_gated_delta_rule` of flash-linear-attention takes, from 0.3 on."""
    assert scale is None  # then it is one over the root of the key size
    assert use_qk_l2norm_in_kernel
    assert q.shape == k.shape
    assert q.shape[2] == v.shape[2] == g.shape[2] == beta.shape[2]
    assert initial_state is None or len(initial_state) == len(q)
    output, last = by_definition(q, k, v, g, beta, initial_state)
    return output.to(q.dtype), last.float() if output_final_state else None


@pytest.mark.parametrize("from_states", [False, True])
def test_a_kernel_is_given_what_it_takes(from_states):
    inputs, states = drawn(3, 20), drawn_states(3) if from_states else None
    seen = run_kernel(double, *inputs, states=states, final_states=True)
    wanted = gated_delta_rule(*inputs, states=states, final_states=True)
    for ours, theirs in zip(seen, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert run_kernel(double, *inputs, states=states)[1] is None


def test_where_there_is_a_kernel_the_rule_runs_by_it(monkeypatch):
    inputs, states = drawn(3, 20), drawn_states(2)
    wanted, last = gated_delta_rule(*inputs, states=states, sharing=SHARING, final_states=True)
    calls: list[int] = []
    monkeypatch.setattr(
        delta_rule, "kernel_for", lambda *_: lambda *parts, **options: calls.append(1) or double(*parts, **options)
    )
    seen, seen_last = gated_delta_rule(*inputs, states=states, sharing=SHARING, final_states=True)
    assert calls == [1]
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen_last, last, atol=1e-5, rtol=1e-5)


def by_torch(inputs: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    return gated_delta_rule(*inputs, states=states, final_states=True)


def test_on_cpus_there_is_none():
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.zeros(1, 1, 1, 8, dtype=dtype)
        assert kernel_for(query, query, by_torch) is None


def forgetful(*parts: Tensor, initial_state: Tensor | None = None, **options: bool) -> tuple[Tensor, Tensor | None]:
    return double(*parts, initial_state=None if initial_state is None else 0 * initial_state, **options)


def without_gradient(*parts: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:
    query, *others = parts
    return double(query.detach() + 0 * query, *others, **options)


def not_a_number(*parts: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:
    output, last = double(*parts, **options)
    assert last is not None
    return output, last * float("nan")


def failing(*parts: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError("PTX was compiled with\nan unsupported toolchain")


def test_a_kernel_that_is_right_is_used():
    with torch.inference_mode():
        assert is_right(double, by_torch, torch.device("cpu"), 16, 24)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (forgetful, " here: torch is used"),
        (without_gradient, " here: torch is used"),
        (not_a_number, "off by nan here: torch is used"),
        (failing, "fails here (PTX was compiled with\\nan unsupported toolchain): torch is used"),
    ],
)
def test_a_kernel_that_is_not_is_left(kernel, message, caplog):
    assert not is_right(kernel, by_torch, torch.device("cpu"), 16, 24)
    assert message in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("fla") is None, reason="needs a GPU, and fla")
def test_on_gpus_the_kernel_gives_what_torch_gives_in_bfloat16(monkeypatch):
    query = torch.zeros(1, 1, 1, 8, device="cuda")
    assert kernel_for(query, query, by_torch) is None  # float32
    sizes = {"key_heads": 16, "heads": 32, "size": 128, "width": 128}
    inputs = [part.to("cuda", torch.bfloat16) for part in drawn(3, 90, **sizes)]
    inputs[3] = inputs[3].float()
    states = drawn_states(2, **sizes).cuda()
    sharing = StateSharing(OWNERS.cuda(), tuple((indices.cuda(), count) for indices, count in SHARING.groups))
    results = []
    proven = kernel_for(inputs[0], inputs[2], by_torch)
    assert proven is not None
    for kernel in (proven, None):
        monkeypatch.setattr(delta_rule, "kernel_for", lambda *_, kernel=kernel: kernel)
        parts = [part.clone().requires_grad_(True) for part in (*inputs, states)]
        output, last = gated_delta_rule(*parts[:5], states=parts[5], sharing=sharing, final_states=True)
        gradients = torch.autograd.grad(output.float().square().sum() + last.square().sum(), parts)
        results.append((output, last, *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= 2e-2 * theirs.float().abs().max()
