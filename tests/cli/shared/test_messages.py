"""What a command tells beside its result, with `--quiet`, with `--verbose` and with neither."""

from __future__ import annotations

import logging
import re
import warnings

import pytest

from qwen_vl_classifier.cli.main import main

OWN, OTHER = logging.getLogger("qwen_vl_classifier.some.module"), logging.getLogger("another")


@pytest.fixture
def told(monkeypatch, capsys):
    """Return standard error and output of a command that tells something at each level, and whether to show bars."""

    def run(flags) -> int:
        for logger in (OWN, OTHER):
            logger.debug("a detail of %s", logger.name)
            logger.warning("a warning of %s", logger.name)
        OWN.error("an error")
        print("result", flags.progress)
        return 0

    monkeypatch.setattr("qwen_vl_classifier.cli.info.run", run)

    def lines(*flags: str) -> tuple[list[str], str]:
        assert main(["info", *flags]) == 0
        captured = capsys.readouterr()
        return [re.sub(r"^\[ *\d+\.\d s\] ", "- ", line) for line in captured.err.splitlines()], captured.out

    return lines


def test_details_and_their_time_on_request(told):
    lines, out = told("--verbose")
    assert lines[0].startswith("- qwen-vl-classifier 0.")
    assert lines[1:] == [
        "- a detail of qwen_vl_classifier.some.module",
        "- a warning of qwen_vl_classifier.some.module",
        "- a warning of another",
        "- an error",
    ]
    assert out == "result True\n"
    assert told() == ([], "result True\n"), "the handler is removed again"


def test_neither_details_nor_warnings_nor_bars(told, caplog):
    _, out = told("--quiet")
    assert [record.getMessage() for record in caplog.records] == ["an error"]
    assert out == "result False\n"
    assert logging.getLogger().isEnabledFor(logging.WARNING)


def test_warnings_of_python_are_dropped_too(monkeypatch, capsys):
    monkeypatch.setattr("qwen_vl_classifier.cli.info.run", lambda _: warnings.warn("old", stacklevel=1) or 0)
    assert main(["info", "--quiet"]) == 0
    with pytest.raises(UserWarning):
        main(["info"])


def test_an_error_is_told_in_any_case(capsys):
    assert main(["info", "builtin:tinny", "--quiet"]) == 2
    assert "did you mean 'builtin:tiny'?" in capsys.readouterr().err
    assert main(["info", "--quiet", "--verbose"]) == 2
    assert capsys.readouterr().err == "qwen-vl-classifier info: --quiet with --verbose; give one of them\n"


def test_what_is_loaded_from_where_onto_which_device(capsys):
    assert main(["info", "builtin:tiny", "--verbose"]) == 0
    told = capsys.readouterr().err
    assert re.search(r"loaded backbone builtin:tiny from .*tiny: Qwen2.5-VL, .* (float32|bfloat16) on cpu, in \d", told)
