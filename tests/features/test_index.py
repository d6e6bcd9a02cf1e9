"""KeyIndex: what a dict would answer, in 24 bytes for each entry."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.features import index
from qwen_vl_classifier.features.index import KeyIndex

# Few values in each half of what is compared, so that keys agree in one half and differ in the other.
KEYS = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
    lambda halves: bytes([halves[0]]) * 8 + bytes([halves[1]]) * 24
)
SHARDS = st.lists(st.lists(KEYS, min_size=1, max_size=6), max_size=8)


def as_array(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)


def random_shards(count: int, rows: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (rows, 32), dtype=np.uint8) for _ in range(count)]


@settings(max_examples=150)
@given(shards=SHARDS, asked=st.lists(KEYS, max_size=12), dropped=st.sets(st.integers(0, 7)), most=st.integers(1, 20))
def test_it_answers_as_a_dict_of_places_does(shards, asked, dropped, most):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index, "_MOST_IN_A_RUN", most)
        tested = KeyIndex()
        half = len(shards) // 2
        tested.add((number, as_array(keys)) for number, keys in enumerate(shards[:half]))
        for number, keys in enumerate(shards[half:], start=half):
            tested.add([(number, as_array(keys))])
    for number in dropped:
        tested.discard(number)
    places: dict[bytes, set[tuple[int, int]]] = {}
    for number, keys in enumerate(shards):
        for row, key in enumerate(keys):
            if number not in dropped:
                places.setdefault(key, set()).add((number, row))
    assert len(tested) == len(places)
    for key, shard, row in zip(asked, *tested.find(as_array(asked)), strict=True):
        if key in places:
            assert (shard, row) in places[key]
        else:
            assert shard == -1


def test_a_million_keys_take_24_bytes_each():
    shards = random_shards(250, 4_000)
    tracemalloc.start()
    try:
        tested = KeyIndex()
        for number, keys in enumerate(shards):
            tested.add([(number, keys)])
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 24_000_000 <= taken < 24_100_000
    assert len(tested) == 1_000_000
    for number in (0, 77, 249):
        found, rows = tested.find(shards[number])
        assert (found == number).all()
        np.testing.assert_array_equal(rows, np.arange(4_000))
    assert (tested.find(random_shards(1, 1_000, seed=1)[0])[0] == -1).all()


def test_keys_need_not_lie_side_by_side_in_memory():
    keys = random_shards(1, 10)[0]
    tested = KeyIndex()
    tested.add([(3, keys[::2])])
    assert tested.find(keys)[0].tolist() == [3, -1] * 5
