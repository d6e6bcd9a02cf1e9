"""Options of a command from a TOML file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_vl_classifier import TrainConfig
from qwen_vl_classifier.cli.flags import from_flags
from qwen_vl_classifier.cli.main import build_parser, main

TRAIN = """
[train]
out = "made"          # a required option
positive = 1          # a label, as text
class-names = "no,yes"
heads = "linear"
folds = 3
target_error_rate = 0
dropout = 0.25
exportable = true
max_errors = "5%"
quiet = true

[evaluate]
checks = false

[threshold]
set = 0.9

[extract]
features = "kept"
skip-bad-rows = true
"""


@pytest.fixture
def parsed(tmp_path):
    """Return a function that parses the words of a command, with the file above."""
    file = tmp_path / "options.toml"
    file.write_text(TRAIN)
    return lambda *words: build_parser().parse_args([*words, "--config", str(file)])


def test_the_file_gives_options_and_flags_win(parsed):
    flags = parsed("train", "data", "--folds", "4", "--no-exportable")
    config = TrainConfig(heads="linear", folds=4, dropout=0.25, max_errors="5%")
    assert from_flags(TrainConfig, flags) == config
    assert (flags.out, flags.positive, flags.class_names, flags.quiet) == (Path("made"), "1", ("no", "yes"), True)
    assert isinstance(flags.target_error_rate, float)
    assert parsed("train", "data", "--out", "other").out == Path("other")


def test_each_command_has_its_table(parsed):
    assert parsed("evaluate", "a", "b").checks is False
    assert parsed("evaluate", "a", "b", "--checks").checks is True
    assert parsed("extract", "data").max_errors == "100%"
    assert parsed("extract", "data").features == Path("kept")


def test_a_flag_wins_over_what_it_excludes(parsed):
    assert parsed("threshold", "a", "--out", "b").set == 0.9
    flags = parsed("threshold", "a", "data", "--out", "b", "--objective", "f1")
    assert (flags.objective, flags.set) == ("f1", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train]\nephochs = 3", "[train] ephochs: unknown option; did you mean 'epochs'?"),
        ("[train]\nno_exportable = true", "[train] no_exportable: unknown option; did you mean 'exportable'?"),
        ("[train]\nepochs = '3'", "[train] epochs = '3': expected a whole number"),
        ("[train]\nepochs = true", "[train] epochs = true: expected a whole number"),
        ("[train]\nepochs = 3.0", "[train] epochs = 3.0: expected a whole number"),
        ("[train]\ndropout = 'much'", "[train] dropout = 'much': expected a number"),
        ("[train]\nheads = ['linear', 'mlp']", "[train] heads = ['linear', 'mlp']: expected text in quotes"),
        ("[train]\nout = 3", "[train] out = 3: expected text in quotes"),
        ("[train]\nexportable = 1", "[train] exportable = 1: expected true or false"),
        ("[train]\ndtype = 'float23'", "[train] dtype = 'float23': expected one of auto, float32, bfloat16; did you"),
        ("[train]\nclass_names = 'a'", "[train] class_names = 'a': 'a'; expected two different words"),
        ("[train]\nhelp = true", "[train] help: give this option on the command line"),
        ("[train]\nconfig = 'x'", "[train] config: give this option on the command line"),
        ("[train]\nepochs", "is not TOML (Expected '=' after a key"),
        ("[train]\nout = '\x00'", "is not TOML ("),
        ("epochs = 3", "epochs stands outside of a table; expected the name of a command above it, such as [train]"),
        ("[train]\n[trian]", "[trian] is not a command; did you mean 'train'?"),
        ("[score]", "has no table [train]; expected one with the options of this command"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line(content, message, tmp_path, capsys):
    file = tmp_path / "options.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["train", "data", "--out", "made", f"--config={file}"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qwen-vl-classifier train: {file}: {message}")


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes.toml").write_bytes(b"[train]\nout = '\xff'")
    (tmp_path / "large.toml").write_bytes(b"#" * 1_000_001)
    (tmp_path / "deep.toml").write_text("[train]\nout = " + "[" * 100_000)
    for name, reason in {
        "missing.toml": "cannot be read (No such file or directory); expected a TOML file",
        "pipe": "cannot be read (it is a pipe, socket or device)",
        "large.toml": "cannot be read (it has 1,000,001 bytes",
        "bytes.toml": "is not TOML (",
        "deep.toml": "is not TOML (",
    }.items():
        with pytest.raises(SystemExit):
            main(["train", "data", "--out", "made", "--config", str(tmp_path / name)])
        assert f"{tmp_path / name}: {reason}" in capsys.readouterr().err


def test_the_value_of_an_option_is_checked_as_that_of_a_flag(tmp_path, capsys):
    file = tmp_path / "options.toml"
    file.write_text("[train]\nfolds = 1")
    assert main(["train", "data", "--out", str(tmp_path / "made"), "--config", str(file)]) == 2
    assert "--folds 1: give 2 or more" in capsys.readouterr().err
