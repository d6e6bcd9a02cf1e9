"""Where consecutive sequences lie."""

from __future__ import annotations

import pytest
import torch

from qwen_vl_classifier.backbone.layers.sequences import sequences_of


def test_sequences_of_one_length_need_no_places():
    sequences = sequences_of([4, 4, 4], grouped=True)
    assert sequences.starts.tolist() == [0, 4, 8, 12]
    assert sequences.starts.dtype == torch.int32
    assert sequences.longest == 4
    assert sequences.groups == ((4, None),)


def test_sequences_of_several_lengths_have_their_places():
    sequences = sequences_of([2, 3, 2], grouped=True)
    assert sequences.longest == 3
    assert [(length, places.tolist()) for length, places in sequences.groups] == [(2, [0, 1, 5, 6]), (3, [2, 3, 4])]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sequences_move(device):
    moved = sequences_of([2, 3], grouped=True).to(device)
    assert moved.starts.device.type == moved.groups[0][1].device.type == device
    assert moved.longest == 3
