"""Attention of many lengths is used where it is right."""

from __future__ import annotations

import logging

import pytest
import torch

from qwen_vl_classifier.backbone.layers import varlen
from tests.backbone.layers import varlen_definition

CPU = torch.device("cpu")


def top_left(*arguments, **options):
    """See the first keys where there are more keys than queries, as plain attention does without a mask."""
    query, key, value, starts, key_starts, longest, _ = arguments
    edges = zip(starts[:-1], starts[1:], key_starts[:-1], strict=True)
    kept = torch.cat([torch.arange(end - start) + first for start, end, first in edges])
    longest_kept = (starts, starts, longest, longest)
    if options["window_size"] == (-1, -1):
        return varlen_definition.varlen_attn(*arguments, **options)
    return varlen_definition.varlen_attn(query, key[kept], value[kept], *longest_kept, **options)


def not_differentiable(*arguments, **options):
    return varlen_definition.varlen_attn(*(part.detach() for part in arguments[:3]), *arguments[3:], **options)


def failing(*_, **__):
    raise RuntimeError("no kernel image is available for execution on the device\nmore")


def blind_to_heads(*arguments, **options):
    """Ignore that keys have fewer heads, as a function might that does not check it."""
    query, key, value, *others = arguments
    wrong = (torch.cat([part] * (query.shape[1] // key.shape[1]), dim=1) for part in (key, value))
    return varlen_definition.without_gqa(query, *wrong, *others, **options)


def without_enable_gqa(function):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return function(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return older


def proven(monkeypatch, function, groups: int = 2, *, gradients: bool = True):
    varlen.proven_attention.cache_clear()
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
    return varlen.proven_attention(CPU, torch.float32, 16, groups, gradients)


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_its_definition_is_right(monkeypatch, groups):
    attention = proven(monkeypatch, varlen_definition.varlen_attn, groups)
    assert attention is not None
    assert getattr(attention, "keywords", {}) == ({"options": {"enable_gqa": True}} if groups > 1 else {})


@pytest.mark.parametrize(("function", "word"), [(top_left, "off"), (not_differentiable, "fails"), (failing, "fails")])
def test_what_is_wrong_is_not_used_and_said(monkeypatch, caplog, function, word):
    with caplog.at_level(logging.WARNING):
        assert proven(monkeypatch, function) is None
    assert word in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_lack_of_gradients_matters_to_training_only(monkeypatch):
    assert proven(monkeypatch, not_differentiable, gradients=False) is not None
    assert proven(monkeypatch, top_left, gradients=False) is None


@pytest.mark.parametrize(("function", "repeats"), [(varlen_definition.without_gqa, None), (blind_to_heads, 2)])
def test_keys_are_repeated_where_heads_may_not_differ(monkeypatch, function, repeats):
    attention = proven(monkeypatch, without_enable_gqa(function))
    assert attention is not None
    assert attention.keywords.get("repeats") == repeats


def test_other_devices_and_types_do_without():
    assert not varlen.may_run(CPU, torch.bfloat16, 64)
    assert varlen.varlen_attention(torch.zeros(1, dtype=torch.bfloat16), 64) is None


def test_a_lack_of_memory_says_nothing_about_the_function(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        proven(monkeypatch, full)
    assert proven(monkeypatch, varlen_definition.varlen_attn) is not None
