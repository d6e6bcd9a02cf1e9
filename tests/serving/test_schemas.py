"""Items and messages of requests, and the examples that they become."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.serving.items import Item, ItemError
from qwen_vl_classifier.serving.schemas import parse_item


def parts(*values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(values)}]}


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"text": "a"}, Item("a")),
        ({"text": "a", "image": None}, Item("a")),
        ({"text": "a", "image": []}, Item("a")),
        ({"text": "a", "image": "x"}, Item("a", ("x",))),
        ({"text": "a", "image": ""}, Item("a", ("",))),
        ({"text": "a", "image": ["x", "y"]}, Item("a", ("x", "y"))),
        ({"messages": [{"role": "user", "content": "a"}]}, Item("a")),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, Item("a\nb")),
        (parts(TEXT, {"type": "image_url", "image_url": "x"}), Item("a", ("x",))),
        (parts({"type": "image_url", "image_url": {"url": "x", "detail": "high"}}, TEXT), Item("a", ("x",))),
        (parts({"type": "image_url", "image_url": {"url": "x"}}), Item("", ("x",))),
    ],
)
def test_what_becomes_of_an_item(item: Any, expected: Item) -> None:
    assert parse_item(item) == expected


@pytest.mark.parametrize(
    "item",
    [
        None,
        5,
        "a",
        [],
        {},
        {"image": "x"},
        {"text": None},
        {"text": 5},
        {"text": b"a"},
        {"text": "a", "image": 5},
        {"text": "a", "image": ["x", None]},
        {"text": "a", "image": {"url": "x"}},
        {"text": "a", "more": 1},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": "a", "name": "x"}]},
        {"messages": [{"role": "user", "content": "a"}], "text": "b"},
        parts(),
        parts("a"),
        parts({"type": "text"}),
        parts({"type": "input_audio", "input_audio": {}}),
        parts({"type": "image_url", "image_url": None}),
        parts({"type": "image_url", "image_url": {"url": 5}}),
        parts({"type": "image_url", "image_url": {"url": "x", "detail": "whole"}}),
    ],
)
def test_what_is_malformed(item: Any) -> None:
    error = parse_item(item)
    assert isinstance(error, ItemError)
    assert (error.code, error.status) == ("invalid_item", 400)


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["text", "image", "messages", "role", "content", "type", "image_url", "url"]), inner
            )
        ),
        max_leaves=10,
    )
)
def test_any_item_is_taken_or_refused(item: Any) -> None:
    assert isinstance(parse_item(item), Item | ItemError)
