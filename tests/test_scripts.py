"""The two scripts of the original API run as plain scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import nano

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize("family", nano.FAMILIES)
def test_five_checks_pass_on_other_models(family, tmp_path):
    done = run("test_classifier.py", "--model", str(nano.make_checkpoint(family, tmp_path / family)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 checks passed" in done.stdout


def test_five_checks_can_fail(tmp_path):
    done = run("test_classifier.py", "--model", str(tmp_path))
    assert done.returncode == 1
    assert "1. initialisation: FAILED" in done.stdout


def test_walk_through():
    done = run("example_usage.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same probabilities: True" in done.stdout
    assert "image_grid_thw: missing" in done.stdout
    assert done.stderr == ""


def test_walk_through_names_what_is_wrong():
    done = run("example_usage.py", "--model", "builtin:huge")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "builtin:huge" in done.stderr
