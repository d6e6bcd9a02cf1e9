"""The two scripts of the original API run as plain scripts."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import each_family, nano

ROOT = Path(__file__).resolve().parents[1]

RunHere = Callable[..., tuple[object, str, str]]
"""Takes a script and its arguments; returns exit status, standard output and standard error."""


@pytest.fixture
def run_here(monkeypatch, capsys) -> RunHere:
    """Run a script in this process, which has imported already what takes a script seconds."""

    def run(script: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_five_checks_pass_on_the_built_in_model(fresh):
    done = fresh.run(ROOT / "test_classifier.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 checks passed" in done.stdout


@pytest.mark.parametrize("family", each_family.FAMILIES)
def test_five_checks_pass_on_other_models(family, tmp_path, run_here):
    code, out, _ = run_here("test_classifier.py", "--model", str(nano.make_checkpoint(family, tmp_path / family)))
    assert code == 0, out
    assert "5 of 5 checks passed" in out


def test_five_checks_can_fail(tmp_path, run_here):
    code, out, _ = run_here("test_classifier.py", "--model", str(tmp_path))
    assert code == 1
    assert "1. initialisation: FAILED" in out


def test_walk_through(fresh):
    done = fresh.run(ROOT / "example_usage.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same probabilities: True" in done.stdout
    assert "image_grid_thw: missing" in done.stdout
    assert done.stderr == ""


def test_walk_through_names_what_is_wrong(run_here):
    code, _, errors = run_here("example_usage.py", "--model", "builtin:huge")
    assert code == 2
    assert errors.count("\n") == 1
    assert "builtin:huge" in errors
