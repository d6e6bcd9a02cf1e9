"""Dependencies that are missing or too old are named, with the command that brings them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import MissingExtraError, OldVersionError
from qwen_vl_classifier.extras import OLDEST, require, require_versions


def test_a_missing_extra_is_named():
    with pytest.raises(MissingExtraError, match=r"no_such_module is not installed; run: pip install .*\[scale\]"):
        require("no_such_module", extra="scale")


def test_a_missing_part_of_a_shared_name_is_named():
    with pytest.raises(MissingExtraError, match=r"json\.no_such_part is not installed; run: pip install .*\[serve\]"):
        require("json.no_such_part", extra="serve")


def test_what_is_installed_is_returned():
    assert require("json", extra="none") is json


def test_a_broken_module_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import no_such_module_within")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_within"):
        require("broken_inside", extra="scale")


@pytest.mark.parametrize(("seen", "wanted"), [("4.57.1", "5.17"), ("5.16.9", "5.17"), ("5.17rc1", "5.17")])
def test_an_old_version_is_named(monkeypatch, seen, wanted):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: seen)
    with pytest.raises(OldVersionError, match=rf"transformers {re.escape(seen)}; 5.17 or newer .* pip install"):
        require_versions({"transformers": wanted})


@pytest.mark.parametrize("seen", ["5.17", "5.17.0", "5.23.0", "2.13.0+cpu", "6.0.0.dev1"])
def test_a_new_version_is_enough(monkeypatch, seen):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: seen)
    require_versions({"anything": "2.11"})


def test_a_dependency_that_is_not_there_is_named():
    with pytest.raises(OldVersionError, match="no-such-package is not installed"):
        require_versions({"no-such-package": "1"})


def test_the_oldest_versions_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    for name, version in OLDEST.items():
        (requirement,) = [line for line in project["dependencies"] if re.match(rf"{name}\b", line)]
        assert requirement.startswith(f"{name}>={version}")
