"""What `--help` and `--help-all` show, and that an option works whether or not `--help` shows it."""

from __future__ import annotations

import argparse
import shlex

import pytest

from qwen_vl_classifier import EvaluateConfig, FinetuneConfig, ScoreConfig, ServeConfig, TrainConfig
from qwen_vl_classifier.cli.flags import FullVerbParser, VerbParser, add_flags
from qwen_vl_classifier.cli.main import VERBS, build_parser, main
from qwen_vl_classifier.config.label import LabelConfig

CONFIGS = {
    "label": LabelConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "serve": ServeConfig,
}

UNITS = {
    *("BYTES", "CHARACTERS", "COUNT", "EPOCHS", "EXAMPLES", "FOLDS", "FRACTION", "GIGABYTES", "GPUS", "NUMBER"),
    *("PIXELS", "PORT", "PROBABILITY", "PROCESSES", "RANK", "ROWS", "SECONDS", "SEED", "STEPS", "THREADS", "TOKENS"),
    "UNITS",
}

DIFFERENT = {
    *("--api-key-file", "--batch-size", "--decode-timeout", "--device", "--engine", "--epochs", "--focal-gamma"),
    *(
        "--grace",
        "--group-by",
        "--json",
        "--labels",
        "--learning-rate",
        "--max-errors",
        "--max-image-bytes",
        "--one-of",
    ),
    *("--max-image-pixels", "--max-pixels", "--max-text-chars", "--max-text-tokens", "--method", "--model"),
    *(
        "--objective",
        "--out",
        "--patience",
        "--port",
        "--ray-address",
        "--resume",
        "--seed",
        "--taps",
        "--target-error-rate",
    ),
    *("--overwrite", "--skip-bad-rows", "--validation", "--validation-share", "--weight-decay"),
}


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return what a verb prints for a flag, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

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
def test_help_fits_on_one_screen(verb, shown):
    lines = shown(verb, "--help").splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_an_example_that_parses(verb, shown):
    text = shown(verb, "--help")
    begin, end = text.index("example:\n"), text.index("\n\n", text.index("example:\n"))
    assert begin < text.index("options:")
    command = text[begin:end].removeprefix("example:").replace("\\\n", " ")
    name, *words = shlex.split(command)
    assert name == "qwen-vl-classifier"
    assert build_parser().parse_args(words).verb == verb


@pytest.fixture(scope="module")
def options() -> dict[str, list[argparse.Action]]:
    """Return the options of each verb, with their help."""
    (verbs,) = (action for action in build_parser(full_help=True)._actions if isinstance(action.choices, dict))
    return {
        verb: [action for action in parser._actions if action.option_strings] for verb, parser in verbs.choices.items()
    }


@pytest.mark.parametrize("verb", VERBS)
def test_numbers_have_their_unit(verb, options):
    for action in options[verb]:
        is_number = action.type in (int, float) or (isinstance(action.default, (int, float)) and action.nargs != 0)
        if is_number and not action.choices:
            assert action.metavar in UNITS, action.option_strings


def test_an_option_reads_the_same_for_every_command(options):
    """But for options whose meaning or default depends on what the command does."""
    seen: dict[str, set[str]] = {}
    for actions in options.values():
        for action in actions:
            for name in action.option_strings:
                assert action.help
                seen.setdefault(name, set()).add(f"{action.metavar} {action.help % vars(action)}")
    assert {name for name, texts in seen.items() if len(texts) > 1} <= DIFFERENT


def test_the_first_help_names_every_command_and_fits(shown, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {*VERBS}


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
        (["blurb"], "unknown command 'blurb'; expected one of demo, label, train, "),
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
        (["explain", "c", "i.png", "a", "cat"], "unexpected argument 'cat'; a text with spaces needs quotes around it"),
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
    assert flags.inputs[-1] == "--objektive"
    assert build_parser().parse_args(["predict", "c", "-", "--no such flag"]).inputs[-1] == "--no such flag"


def test_no_words_show_the_help(capsys):
    assert main([]) == 2
    assert "example:\n  qwen-vl-classifier demo" in capsys.readouterr().err
