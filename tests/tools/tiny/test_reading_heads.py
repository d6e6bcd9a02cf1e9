"""Readers: what counts as right, and that nothing is asked where there is nothing to read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tools.tiny.lessons import MOST_COUNTED, PATCH_CLASSES
from tools.tiny.reading_heads import PatchReader, PhraseReader


def zeroed(reader: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.zero_()
    return reader


def test_the_reader_counts_a_patch_only_if_everything_is_right():
    reader = zeroed(PatchReader(8, merge_size=2))
    labels = torch.tensor([[1, 2, 3, 1], [0, 0, 0, 0], [2, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        # What each of the four patches is read as, by the bias alone; the last one wrong in its size.
        bias = reader.content.bias.view(4, -1)
        read = labels.clone()
        read[3, 2] = 2
        starts = torch.tensor([0, *PATCH_CLASSES[:-1]]).cumsum(0)
        bias.scatter_(1, read + starts, 9.0)
    _, right = reader(torch.zeros(1, 8), labels, torch.zeros(1, 2))
    assert right.item() == pytest.approx(2 / 3)


NOWHERE = [float("nan")] * 2


def named(counts: list[list[int]], places: list[list[float]], offsets: list[list[float]]) -> SimpleNamespace:
    """Phrases at the first tokens of one row."""
    return SimpleNamespace(
        phrase_rows=torch.zeros(len(counts), dtype=torch.long),
        phrase_columns=torch.arange(len(counts)),
        phrase_counts=torch.tensor(counts),
        phrase_places=torch.tensor(places),
        phrase_offsets=torch.tensor(offsets),
    )


def test_counts_are_read_for_the_parts_that_there_are():
    reader = zeroed(PhraseReader(8))
    with torch.no_grad():  # every phrase is read as: two in the first part, none in the others
        bias = reader.count.bias.view(-1, MOST_COUNTED + 1)
        bias[0, 2] = bias[1, 0] = bias[2, 0] = 9.0
    hidden = torch.zeros(1, 3, 8)
    batch = named([[2, -1, -1], [2, 0, 3], [1, 0, 0]], [NOWHERE] * 3, [NOWHERE] * 3)
    loss, right = reader(hidden, hidden, batch)
    assert right.item() == pytest.approx(5 / 7)
    assert loss.item() > 0


@pytest.mark.parametrize("what", ["places", "offsets"])
def test_places_and_offsets_count_where_there_are_any(what):
    reader = zeroed(PhraseReader(8))
    hidden = torch.zeros(1, 2, 8)
    counts = [[1, -1, -1], [1, -1, -1]]

    def loss(known: list[list[float]]) -> float:
        values = {"places": [NOWHERE] * 2, "offsets": [NOWHERE] * 2, what: known}
        return reader(hidden, hidden, named(counts, **values))[0].item()

    nothing = loss([NOWHERE, NOWHERE])
    assert loss([[0.0, 0.0], NOWHERE]) == pytest.approx(nothing)
    assert loss([[1.0, 1.0], NOWHERE]) == pytest.approx(nothing + 1)
