"""The list of every command and option, as pages show it."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.cli.main import VERBS, main
from qwen_vl_classifier.cli.shared.reference import Command, commands


@pytest.fixture(scope="module")
def listed() -> dict[str, Command]:
    return {command.name: command for command in commands()}


def test_every_command_is_listed_in_the_order_of_the_help(listed):
    assert tuple(listed) == VERBS
    assert listed["train"].group == listed["finetune"].group == "make a classifier"
    for command in listed.values():
        assert command.summary
        assert command.description.endswith(".")
        assert all(line.startswith(f"qwen-vl-classifier {command.name}") for line in command.usage)
        assert command.example.startswith(f"qwen-vl-classifier {command.name}")


def test_options_are_those_of_the_help(listed, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    for flag, are_shown in (("--help-all", lambda option: True), ("--help", lambda option: option.common)):
        with pytest.raises(SystemExit):
            main(["serve", flag])
        shown = " ".join(capsys.readouterr().out.split())
        for option in listed["serve"].options:
            text = f"{option.value} {option.help}".strip()
            assert (text in shown) is are_shown(option), text


def test_what_is_known_of_an_option(listed):
    options = {name: option for option in listed["finetune"].options for name in option.names or (option.value,)}
    assert options["DATA"].names == ()
    assert options["DATA"].required
    assert options["--out"].required
    assert (options["--method"].value, options["--method"].common) == ("{lora,qlora,full}", True)
    assert (options["--rank"].value, options["--rank"].section, options["--rank"].common) == ("RANK", "adapters", False)
    assert options["--no-merge"] is options["--merge"]
    assert options["--merge"].value == ""
    assert options["--warmup"].help == "fraction of the steps during which learning rates rise (default: 0.1)"
    assert "5% " in options["--max-errors"].help
