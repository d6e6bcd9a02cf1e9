"""The mask of packed rows, compared with its definition token by token."""

from __future__ import annotations

import torch

from qwen_vl_classifier.backbone.attention import packed_mask


def test_suffixes_see_the_prefix_and_themselves_only():
    segments = [[0, 0, 1, 1, 2, -1], [-1, -1, 0, 0, 1, 1]]
    mask = packed_mask(segments, torch.device("cpu"))
    assert mask.shape == (2, 1, 6, 6)
    for row, line in enumerate(segments):
        for query, own in enumerate(line):
            for key, other in enumerate(line):
                sees = key <= query and -1 not in (own, other) and other in (0, own)
                assert bool(mask[row, 0, query, key]) == (sees or query == key), (row, query, key)


def test_every_query_sees_something():
    assert packed_mask([[-1, -1, -1]], torch.device("cpu")).any(dim=-1).all()
