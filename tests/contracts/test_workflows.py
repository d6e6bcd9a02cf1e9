"""What GitHub runs is what `make` has, on the versions of Python that the package names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_it_runs_targets_of_make(path):
    if not path.exists():
        pytest.skip("the source distribution has no such files")
    commands = re.findall(r"^(?:exec |\s*- run: )?make ([a-z-]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"test", "docs", "release-check"} == set(commands)
    assert set(commands) <= set(TARGETS)


def test_the_tested_versions_are_those_of_the_package():
    if not WORKFLOWS:
        pytest.skip("the source distribution has no such files")
    (path,) = WORKFLOWS
    tested = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.removeprefix("Programming Language :: Python :: ") for line in project["classifiers"]]
    assert tested == [version for version in named if re.fullmatch(r"3\.\d+", version)]
