"""Planning is pure: every example once, budgets kept, prefixes shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.backbone.planning import Item, plan, windows_of

ITEMS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 120)).map(lambda pair: Item(pair[0], 20 + pair[0] * 30, pair[1])),
    max_size=40,
)


def row_length(items: list[Item], row: tuple[int, ...]) -> int:
    return items[row[0]].prefix_length + sum(items[index].suffix_length for index in row)


@given(items=ITEMS, token_budget=st.integers(1, 2000), share_prefixes=st.booleans())
def test_every_example_once_and_within_budget(items, token_budget, share_prefixes):
    batches = plan(items, token_budget=token_budget, share_prefixes=share_prefixes)
    assert sorted(index for batch in batches for row in batch for index in row) == list(range(len(items)))
    for batch in batches:
        padded = max(row_length(items, row) for row in batch) * len(batch)
        assert padded <= token_budget or len(batch) == 1
        for row in batch:
            assert len({items[index].prefix for index in row}) == 1
            # Only a single example may be longer than the budget: nothing can be done about that one.
            assert row_length(items, row) <= token_budget or len(row) == 1
            assert share_prefixes or len(row) == 1


def test_texts_about_one_picture_share_its_row():
    items = [Item("picture", 100, 10)] * 8
    assert plan(items, token_budget=1000) == [(tuple(range(8)),)]


def test_wide_models_put_more_texts_into_a_row_than_narrow_ones():
    """Another copy of the prefix costs a wide model more; attention among texts costs a narrow one more."""
    items = [Item("picture", 180, 25)] * 32
    rows = {
        width: sum(len(batch) for batch in plan(items, token_budget=4000, hidden_size=width))
        for width in (64, 512, 4096)
    }
    assert rows[64] > rows[512] > rows[4096] == 1


def test_longest_rows_come_first():
    items = [Item(number, 10, length) for number, length in enumerate((5, 50, 20, 40))]
    order = [index for batch in plan(items, token_budget=60) for row in batch for index in row]
    assert order == [1, 3, 2, 0]


def test_sorting_keeps_padding_small():
    items = [Item(number, 10, 390 if number % 8 == 0 else 10) for number in range(64)]
    batches = plan(items, token_budget=4000)
    used = sum(item.prefix_length + item.suffix_length for item in items)
    padded = sum(max(row_length(items, row) for row in batch) * len(batch) for batch in batches)
    unsorted = 64 * 400  # every row as long as the longest
    assert padded <= 1.2 * used < unsorted / 4


def test_nothing_to_plan():
    assert plan([], token_budget=10) == []


def test_windows_hold_everything_in_order():
    for count in (0, 1, 256, 257, 600):
        windows = list(windows_of(iter(range(count))))
        assert [item for window in windows for item in window] == list(range(count))
        assert all(len(window) == 256 for window in windows[:-1])
