"""Taps: written form, bounds and the arithmetic of pooling."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier import Tap
from qwen_vl_classifier.backbone.taps import POOLINGS, Spans, pooling_weights
from qwen_vl_classifier.errors import ConfigError


@pytest.mark.parametrize("text", ["mean:-1", "last:24", "image:1", "text:3", "mean:24:normed"])
def test_written_form_round_trips(text):
    assert str(Tap.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mean",
        "mean:",
        "mean:x",
        "max:-1",
        "mean:0",
        "mean:-2",
        "mean:1.5",
        "-1:mean",
        "mean:1:norm",
        "mean:1:",
        "mean::normed",
        "mean:1:normed:2",
    ],
)
def test_malformed_taps_are_refused(text):
    with pytest.raises(ConfigError):
        Tap.parse(text)


def test_the_last_layer_is_normed_in_any_case():
    assert Tap(-1, "mean", normed=True) == Tap(-1, "mean")
    assert str(Tap(-1, "mean", normed=True)) == "mean:-1"
    assert Tap(2, "mean", normed=True) != Tap(2, "mean")


@pytest.mark.parametrize(
    ("text", "exportable"),
    [("mean:-1", True), ("last:3:normed", True), ("mean:3", False), ("image:-1", False), ("text:3:normed", False)],
)
def test_other_engines_read_all_tokens_or_the_last_after_the_final_norm(text, exportable):
    assert Tap.parse(text).exportable == exportable


def test_normed_is_true_or_false():
    with pytest.raises(ConfigError, match="true or false"):
        Tap(1, "mean", normed="yes")


def test_layer_must_be_a_whole_number():
    with pytest.raises(ConfigError, match="whole number"):
        Tap(True, "mean")


def test_weights_are_means_over_the_spans():
    spans = [
        Spans(tokens=((0, 4), (4, 6)), image=((1, 2), (3, 4)), text=(4, 5)),
        Spans(tokens=((0, 4), (6, 9)), image=(), text=(7, 7)),
    ]
    rows = {pooling: pooling_weights(spans, pooling, 10) for pooling in POOLINGS}
    half, sixth, seventh = 1 / 2, 1 / 6, 1 / 7
    np.testing.assert_allclose(rows["mean"][0], [sixth] * 6 + [0] * 4, rtol=1e-6)
    np.testing.assert_allclose(rows["mean"][1], [seventh] * 4 + [0, 0] + [seventh] * 3 + [0], rtol=1e-6)
    np.testing.assert_allclose(rows["image"][0], [0, half, 0, half] + [0] * 6, rtol=1e-6)
    assert not rows["image"][1].any()
    assert rows["text"][0].nonzero()[0].tolist() == [4]
    assert not rows["text"][1].any()
    assert [row.nonzero()[0].tolist() for row in rows["last"]] == [[5], [8]]


def test_a_misspelled_pooling_is_recognised():
    with pytest.raises(ConfigError, match=r"tap pooling .maen.: expected one of .*; did you mean 'mean'"):
        Tap.parse("maen:-1")
