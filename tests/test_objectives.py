"""Objectives: what is written is what is meant, and what is not understood is named in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.objectives import Objective


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("accuracy", Objective("accuracy")),
        ("f1", Objective("f1")),
        (" balanced\n", Objective("balanced")),
        ("recall>=0.9", Objective("recall", 0.9)),
        ("recall >= 1", Objective("recall", 1.0)),
        ("precision>=.5", Objective("precision", 0.5)),
        ("cost=5:1", Objective("cost", miss=5.0, false_alarm=1.0)),
        ("cost = 0.25 : 1e2", Objective("cost", miss=0.25, false_alarm=100.0)),
    ],
)
def test_what_is_written_is_what_is_meant(text, wanted):
    assert Objective.parse(text) == wanted
    assert Objective.parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F1",
        "acc",
        "recall",
        "recall>0.9",
        "recall=>0.9",
        "recall>=",
        "recall>=nan",
        "recall>=-0.1",
        "recall>=0.9.1",
        "precision<=0.9",
        "cost",
        "cost=5",
        "cost=5:1:1",
        "cost=-1:1",
        "cost=inf:1",
        "accuracy\0",
        "a\nb" * 100,
    ],
)
def test_what_is_not_understood_is_named_with_the_grammar(text):
    with pytest.raises(
        ConfigError, match=r"give accuracy, f1, balanced, recall>=R, precision>=P or cost=FN:FP"
    ) as seen:
        Objective.parse(text)
    assert "\n" not in str(seen.value)
    assert len(str(seen.value)) < 300


@pytest.mark.parametrize(
    "text", ["recall>=0", "precision>=1.01", "recall>=1e9", "cost=0:1", "cost=1:0", "cost=1e999:1"]
)
def test_a_number_out_of_its_range_is_named(text):
    with pytest.raises(ConfigError, match=f"objective '{text}': give") as seen:
        Objective.parse(text)
    assert "\n" not in str(seen.value)


@given(st.text(max_size=30))
def test_any_text_is_an_objective_or_a_config_error(text):
    try:
        found = Objective.parse(text)
    except ConfigError:
        return
    assert Objective.parse(str(found)) == found
