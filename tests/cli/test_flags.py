"""What `--help` and `--help-all` show, and that an option works whether or not `--help` shows it."""

from __future__ import annotations

import pytest

from qwen_vl_classifier import EvaluateConfig, FinetuneConfig, ScoreConfig, ServeConfig, TrainConfig
from qwen_vl_classifier.cli.flags import FullVerbParser, VerbParser, add_flags
from qwen_vl_classifier.cli.main import VERBS, main

CONFIGS = {
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "serve": ServeConfig,
}


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return what a verb prints for a flag, on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def read(verb: str, flag: str) -> str:
        with pytest.raises(SystemExit) as end:
            main([verb, flag])
        assert end.value.code == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_on_about_one_screen(verb, shown):
    assert len(shown(verb, "--help").splitlines()) <= 56


@pytest.mark.parametrize("verb", CONFIGS)
def test_all_options_are_shown_on_demand(verb, shown):
    common, everything = shown(verb, "--help"), shown(verb, "--help-all")
    assert "--help-all" in common
    for name in CONFIGS[verb].__dataclass_fields__:
        if name != "classifiers":
            assert f"--{name.replace('_', '-')}" in everything
    assert len(everything) > len(common)


def test_only_values_that_say_something_are_shown_as_defaults(shown):
    for verb in VERBS:
        text = " ".join(shown(verb, "--help-all").split())
        for nothing in ("(default: )", "(default: None)", "(default: True)", "(default: False)"):
            assert nothing not in text


@pytest.mark.parametrize("kind", [VerbParser, FullVerbParser])
def test_rare_options_work_in_either_parser(kind):
    parser = kind()
    add_flags(parser, TrainConfig, section="training")
    assert parser.parse_args(["--units", "64", "--heads", "mlp"]).units == 64
