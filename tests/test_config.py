"""Options are declared once; flags are made from them; impossible values are refused."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest

from qwen_vl_classifier import FinetuneConfig, ScoreConfig, ServeConfig, TrainConfig
from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import ConfigError

CONFIGS = (TrainConfig, FinetuneConfig, EvaluateConfig, ScoreConfig, ServeConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_flags_without_values_are_the_defaults(config):
    parser = VerbParser()
    add_flags(parser, config)
    assert from_flags(config, parser.parse_args([])) == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_has_help(config):
    for item in dataclasses.fields(config):
        if item.metadata.get("flag", True):
            assert item.metadata["help"]
            assert not item.metadata["help"].removesuffix("...").endswith(".")


def test_flags_take_their_types_from_the_defaults():
    parser = VerbParser()
    add_flags(parser, FinetuneConfig)
    given = ["--epochs", "7", "--learning-rate", "2e-6", "--bf16", "--no-gradient-checkpointing"]
    config = from_flags(FinetuneConfig, parser.parse_args(given))
    assert (config.epochs, config.learning_rate, config.bf16) == (7, 2e-6, True)
    assert config.gradient_checkpointing is False


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (TrainConfig, "epochs", 0),
        (TrainConfig, "learning_rate", 0.0),
        (TrainConfig, "learning_rate", float("nan")),
        (TrainConfig, "dropout", 1.0),
        (TrainConfig, "validation_share", 0.0),
        (TrainConfig, "weight_decay", -1.0),
        (TrainConfig, "seed", -1),
        (TrainConfig, "folds", 1),
        (TrainConfig, "target_error_rate", 1.0),
        (TrainConfig, "focal_gamma", -1.0),
        (TrainConfig, "heads", "linear,forest"),
        (TrainConfig, "heads", ""),
        (partial(TrainConfig, exportable=True), "heads", "linear,mlp"),
        (EvaluateConfig, "resamples", 0),
        (EvaluateConfig, "slice_rows", 0),
        (EvaluateConfig, "check_rows", 0),
        (EvaluateConfig, "seed", -1),
        (TrainConfig, "objective", "beauty"),
        (TrainConfig, "class_weight", "heavy"),
        (TrainConfig, "class_weight", "0:1"),
        (TrainConfig, "class_weight", "0:1,1:0"),
        (TrainConfig, "class_weight", {0: 1.0, 1: float("inf")}),
        (TrainConfig, "class_weight", {0: 1.0, 2: 1.0}),
        (TrainConfig, "class_weight", 3),
        (FinetuneConfig, "batch_size", 0),
        (FinetuneConfig, "head_learning_rate", -1e-4),
        (ScoreConfig, "shard_size", 0),
        (ScoreConfig, "workers", -1),
        (ScoreConfig, "format", "xml"),
        (ScoreConfig, "engine", "spark"),
        (ScoreConfig, "max_errors", "many"),
        (ScoreConfig, "max_errors", "-1"),
        (ScoreConfig, "max_errors", "0.5"),
        (ScoreConfig, "max_errors", "101%"),
        (ScoreConfig, "max_errors", "nan%"),
        (ScoreConfig, "max_errors", "5%%"),
        (ServeConfig, "port", 65536),
        (ServeConfig, "max_batch", 0),
        (ServeConfig, "image_formats", "JPEG,PCX"),
        (ServeConfig, "image_formats", ","),
    ],
)
def test_an_impossible_value_is_named(config, name, value):
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("none", None),
        (None, None),
        ("balanced", "balanced"),
        ("0:1,1:5", {0: 1.0, 1: 5.0}),
        ({0: 2, 1: 1}, {0: 2, 1: 1}),
    ],
)
def test_class_weight_is_written_in_several_ways(written, meant):
    assert TrainConfig(class_weight=written).class_weight == meant


def test_image_formats_are_spelled_in_any_case():
    assert ServeConfig().formats == ("JPEG", "PNG", "WebP")
    assert ServeConfig(image_formats="webp, tiff,TIFF").formats == ("WebP", "TIFF")


def test_heads_are_named_once():
    assert TrainConfig().head_names == ("zero-shot", "calibrated", "linear", "mlp")
    assert TrainConfig(heads="mlp, linear,mlp").head_names == ("mlp", "linear")


@pytest.mark.parametrize(
    ("given", "rows", "most"),
    [
        ("", 10, math.inf),
        ("0", 10, 0),
        ("7", 10, 7),
        ("5%", 1000, 50),
        ("0.5 %", 1000, 5),
        ("0%", 10, 0),
        ("100%", 3, 3),
    ],
)
def test_errors_are_limited_by_number_or_share(given, rows, most):
    assert ScoreConfig(max_errors=given).most_errors(rows) == most


def test_options_that_have_no_effect_beside_others_are_named():
    assert TrainConfig().unused() == FinetuneConfig().unused() == []
    config = TrainConfig(heads="linear", units=64, focal_gamma=2, yes="Ja", validation_share=0.3)
    assert config.unused() == [
        "units=64 has no effect without mlp heads",
        "focal_gamma=2 has no effect without mlp heads",
        "yes='Ja' has no effect without zero-shot heads",
        "validation_share=0.3 has no effect without target_error_rate=",
    ]
    every = TrainConfig(heads="mlp,calibrated", units=64, yes="Ja", validation_share=0.3, target_error_rate=0.1)
    assert every.unused() == []


@pytest.mark.parametrize("name", ["allowed_hosts", "cors_origins", "url_hosts"])
def test_lists_of_hosts_that_name_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} ' , ': names none"):
        ServeConfig(classifiers=("a",), **{name: " , "})


@pytest.mark.parametrize(
    "host",
    [
        *(
            "box:8000",
            "http://box",
            "https://box/",
            "box/",
            "*",
            "*.example.org",
            ".example.org",
            "example.org.",
            "::1",
        ),
        *("a b", "user@box", "[::1]:8000", "[box]", "b\u00f6x", "b\nox", "-box", "box?", "b\0x"),
    ],
)
def test_names_that_no_client_sends_are_refused(host: str) -> None:
    """They would never be met, and whoever gave them would wonder why."""
    with pytest.raises(ConfigError, match="without scheme, port, path or wildcard") as caught:
        ServeConfig(classifiers=("a",), allowed_hosts=f"good,{host}")
    assert len(str(caught.value).splitlines()) == 1


def test_names_of_hosts_in_every_form() -> None:
    names = "box,Box.Example.org,a_b.c,10.0.0.1,[2001:DB8::1],x"
    assert ServeConfig(classifiers=("a",), allowed_hosts=names).names_of("allowed_hosts") == tuple(names.split(","))


def test_a_misspelled_choice_is_recognised():
    with pytest.raises(ConfigError, match="method 'lroa': give one of lora, qlora, full; did you mean 'lora'"):
        FinetuneConfig(method="lroa")
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        TrainConfig(heads="mlp,liner")
