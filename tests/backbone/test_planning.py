"""Planning: every example once, budgets kept, prefixes shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.backbone.pixels import Pictures
from qwen_vl_classifier.backbone.planning import plan, with_common_prefixes
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import Spans


def example(picture: int, prefix: int, suffix: int) -> EncodedExample:
    """An example of so many tokens."""
    pictures = Pictures((), (), (), str(picture).encode())
    return EncodedExample([0] * (prefix + suffix), prefix, Spans((), (), (0, 0)), pictures)


EXAMPLES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 120)).map(lambda pair: example(pair[0], 20 + pair[0] * 30, pair[1])),
    max_size=40,
)


def row_length(examples: list[EncodedExample], row: tuple[int, ...]) -> int:
    prefix = examples[row[0]].prefix_length
    return prefix + sum(len(examples[index].ids) - prefix for index in row)


@given(examples=EXAMPLES, token_budget=st.integers(1, 2000), share_prefixes=st.booleans())
def test_every_example_once_and_within_budget(examples, token_budget, share_prefixes):
    batches = plan(examples, token_budget=token_budget, share_prefixes=share_prefixes)
    assert sorted(index for batch in batches for row in batch for index in row) == list(range(len(examples)))
    for batch in batches:
        padded = max(row_length(examples, row) for row in batch) * len(batch)
        assert padded <= token_budget or len(batch) == 1
        for row in batch:
            assert len({examples[index].pictures.key for index in row}) == 1
            # Only a single example may be longer than the budget: nothing can be done about that one.
            assert row_length(examples, row) <= token_budget or len(row) == 1
            assert share_prefixes or len(row) == 1


def test_texts_about_one_picture_share_its_row():
    examples = [example(0, 100, 10)] * 8
    assert plan(examples, token_budget=1000) == [(tuple(range(8)),)]


def test_wide_models_put_more_texts_into_a_row_than_narrow_ones():
    """Another copy of the prefix costs a wide model more; attention among texts costs a narrow one more."""
    examples = [example(0, 180, 25)] * 32
    rows = {
        width: sum(len(batch) for batch in plan(examples, token_budget=4000, hidden_size=width))
        for width in (64, 512, 4096)
    }
    assert rows[64] > rows[512] > rows[4096] == 1


def test_models_with_little_attention_put_more_texts_into_a_row():
    examples = [example(0, 180, 25)] * 32
    rows = [sum(map(len, plan(examples, token_budget=4000, hidden_size=64, attention=part))) for part in (1, 0.25, 0)]
    assert rows[0] > rows[1] > rows[2] == 1


def test_the_state_of_a_row_counts():
    examples = [example(number, 90, 10) for number in range(12)]
    assert [len(batch) for batch in plan(examples, token_budget=600)] == [6, 6]
    assert [len(batch) for batch in plan(examples, token_budget=600, state_tokens=50)] == [4, 4, 4]
    together = [example(0, 100, 100)] * 4
    assert [len(row) for (row,) in plan(together, token_budget=500, hidden_size=4096)] == [4]
    assert [len(row) for (row,) in plan(together, token_budget=500, hidden_size=4096, state_tokens=50)] == [3, 1]


def test_longest_rows_come_first():
    examples = [example(number, 10, length) for number, length in enumerate((5, 50, 20, 40))]
    order = [index for batch in plan(examples, token_budget=60) for row in batch for index in row]
    assert order == [1, 3, 2, 0]


def test_sorting_keeps_padding_small():
    examples = [example(number, 10, 390 if number % 8 == 0 else 10) for number in range(64)]
    batches = plan(examples, token_budget=4000)
    used = sum(len(item.ids) for item in examples)
    padded = sum(max(row_length(examples, row) for row in batch) * len(batch) for batch in batches)
    unsorted = 64 * 400  # every row as long as the longest
    assert padded <= 1.2 * used < unsorted / 4


@given(examples=EXAMPLES, token_budget=st.integers(1, 2000))
def test_rows_of_any_lengths_fill_a_batch_where_padding_costs_nothing(examples, token_budget):
    batches = plan(examples, token_budget=token_budget, padded=False)
    assert sorted(index for batch in batches for row in batch for index in row) == list(range(len(examples)))
    lengths = [[row_length(examples, row) for row in batch] for batch in batches]
    for batch in lengths:
        assert (sum(batch) <= token_budget and max(batch) * len(batch) <= 2 * token_budget) or len(batch) == 1
    assert len(batches) <= len(plan(examples, token_budget=token_budget))


def test_nothing_to_plan():
    assert plan([], token_budget=10) == []


def prompts(*texts: str, picture: int = 0, image: tuple[int, int] | None = None) -> list[EncodedExample]:
    """Prompts whose tokens are the characters of texts."""
    pictures = Pictures((), (), (), str(picture).encode())
    spans = Spans((), (image,) if image else (), (0, 0))
    made = [list(map(ord, text)) for text in texts]
    return [EncodedExample(ids, len(ids), spans, pictures, shares_prefix=False) for ids in made]


class TestCommonPrefixes:
    def test_prompts_share_what_they_begin_with(self):
        shared = with_common_prefixes(prompts("state, a", "state, bc", "state, bcd"))
        assert [example.prefix_length for example in shared] == [7, 7, 7]
        assert [example.spans.text for example in shared] == [(7, 8), (7, 9), (7, 10)]
        assert plan(shared, token_budget=1000) == [((0, 1, 2),)]

    def test_something_is_left_of_each(self):
        shared = with_common_prefixes(prompts("state", "state, b"))
        assert [example.prefix_length for example in shared] == [4, 4]

    def test_other_prefixes_of_the_same_pictures_have_other_rows(self):
        some = with_common_prefixes(prompts("state, a", "state, b"))
        others = with_common_prefixes(prompts("other, a", "other, b"))
        rows = [row for batch in plan([*some, *others], token_budget=1000) for row in batch]
        assert sorted(rows) == [(0, 1), (2, 3)]

    def test_what_shares_nothing_stays_alone(self):
        for texts, image in ((("a",), None), (("a", "b"), None), (("ab, cd", "ab, ef"), (2, 5))):
            alone = prompts(*texts, image=image)
            assert with_common_prefixes(alone) == alone, "with a picture behind what they begin with"
        apart = [*prompts("state, a", picture=1), *prompts("state, b", picture=2)]
        assert with_common_prefixes(apart) == apart
        assert len(plan(apart, token_budget=1000)[0]) == 2
