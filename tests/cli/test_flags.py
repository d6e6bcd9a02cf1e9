"""What `--help` and `--help-all` show, and that an option works whether or not `--help` shows it."""

from __future__ import annotations

import pytest

from qwen_vl_classifier import EvaluateConfig, FinetuneConfig, ScoreConfig, ServeConfig, TrainConfig
from qwen_vl_classifier.cli.flags import FullVerbParser, VerbParser, add_flags
from qwen_vl_classifier.cli.main import VERBS, build_parser, main

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


@pytest.fixture
def refused(capsys):
    """Return the one line in which wrong words are refused."""

    def read(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

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
            assert f"--{name.replace('_', '-')}" in everything.replace("--[no-]", "--")
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["blurb"], "unknown command 'blurb'; expected one of demo, train, "),
        (["--help-al", "train"], "unknown option --help-al; did you mean '--help'?"),
        (["--positive", "train"], "unknown option --positive; options of a command come after its name"),
        (["train", "d", "--objektive", "f1"], "unknown option --objektive; did you mean '--objective'?"),
        (["train", "d", "--otu=x"], "unknown option --otu; did you mean '--out'?"),
        (["train", "d", "--object", "f1", "--out", "o"], "unknown option --object; did you mean '--objective'?"),
        (
            ["finetune", "d", "--out", "o", "--method", "lroa"],
            "--method 'lroa': expected one of lora, qlora, full; did",
        ),
        (["train", "d", "--out", "o", "--folds", "2.5"], "--folds: '2.5': expected a whole number"),
        (["train", "d", "--out", "o", "--dropout", "much"], "--dropout: 'much': expected a number"),
        (["predict", "c", "i.png", "a", "cat"], "unexpected argument 'cat'; a text with spaces needs quotes around it"),
        (["train", "d", "--out", "o", "--he\x1b[2Jads", "f1"], "unknown option --he"),
    ],
)
def test_wrong_words_are_one_line_with_a_suggestion(words, message, refused):
    line = refused(*words)
    name = words[0] if words[0] in VERBS else ""
    assert line.startswith(f"qwen-vl-classifier {name}".strip() + f": {message}")
    assert line.isprintable()


def test_a_text_that_begins_with_dashes_is_a_text_behind_two_dashes():
    flags = build_parser().parse_args(["predict", "c", "-", "--", "--objektive"])
    assert flags.text == "--objektive"
    assert build_parser().parse_args(["predict", "c", "-", "--no such flag"]).text == "--no such flag"


def test_no_words_show_the_help(capsys):
    assert main([]) == 2
    assert "example:\n  qwen-vl-classifier demo" in capsys.readouterr().err
