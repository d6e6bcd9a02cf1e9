"""Dependencies that are missing or too old are named, with the command that brings them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import MissingExtraError, OldVersionError
from qwen_vl_classifier.extras import OLDEST, install_command, require, require_versions


def test_a_missing_extra_is_named():
    with pytest.raises(MissingExtraError, match=r"no_such_module is not installed; run: pip install .*\[scale\]"):
        require("no_such_module", extra="scale")


def test_a_missing_part_of_a_shared_name_is_named():
    with pytest.raises(MissingExtraError, match=r"json\.no_such_part is not installed; run: pip install .*\[serve\]"):
        require("json.no_such_part", extra="serve")


class Installed:
    """A distribution that an installer recorded."""

    def __init__(self, record: object) -> None:
        self.record = record

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.record is None else json.dumps(self.record)


@pytest.fixture
def command(monkeypatch):
    """The command for the extra "serve", given what the installer recorded."""

    def install(record: object) -> str:
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Installed(record))
        return install_command("serve")

    return install


def test_the_command_names_the_clone(command, tmp_path, monkeypatch):
    clone = tmp_path / "my clone"
    clone.mkdir()
    record = {"url": clone.as_uri(), "dir_info": {"editable": True}}
    assert command(record) == f"pip install -e '{clone}[serve]'"
    monkeypatch.chdir(clone)
    assert command(record) == "pip install -e '.[serve]'"
    assert command(record | {"dir_info": {}}) == "pip install '.[serve]'"
    clone.rmdir()
    assert command(record) == "pip install 'qwen-vl-classifier[serve]'"


def test_the_command_names_the_wheel(command, tmp_path):
    wheel = tmp_path / "qwen_vl_classifier-1.0-py3-none-any.whl"
    wheel.touch()
    assert command({"url": wheel.as_uri(), "archive_info": {}}) == f"pip install '{wheel}[serve]'"


@pytest.mark.parametrize("record", [None, {"url": "https://host/x.whl", "archive_info": {}}])
def test_the_command_names_the_package(command, record):
    assert command(record) == "pip install 'qwen-vl-classifier[serve]'"


def test_the_command_where_nothing_is_installed(monkeypatch):
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    assert install_command("serve") == "pip install 'qwen-vl-classifier[serve]'"


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
