"""Import optional dependencies with an error that names the extra, and check that no dependency is too old."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from qwen_vl_classifier.errors import MissingExtraError, OldVersionError

OLDEST = {"torch": "2.11", "transformers": "5.17", "pillow": "13"}
"""The oldest supported versions, as in pyproject.toml."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Its import name.
        extra: The extra of this package that installs it.

    Raises:
        MissingExtraError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it needs is broken
        raise MissingExtraError(f"{error.name} is not installed; run: {install_command(extra)}") from error


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this package.

    Where the package was installed from a folder or a wheel on this machine, the command names that: an index may hold
    another version, or none.
    """
    try:
        # Written by the installer: https://packaging.python.org/en/latest/specifications/direct-url/
        record = importlib.metadata.distribution("qwen-vl-classifier").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    origin: dict[str, Any] = json.loads(record) if record else {"url": ""}
    address = urlsplit(origin["url"])
    path = Path(unquote(address.path))
    if address.scheme != "file" or not path.exists():
        return f"pip install 'qwen-vl-classifier[{extra}]'"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    name = "." if path == Path.cwd() else str(path)
    return f"pip install {editable}{shlex.quote(f'{name}[{extra}]')}"


def require_versions(oldest: Mapping[str, str] = OLDEST) -> None:
    """Check that no dependency is too old, without importing any.

    Args:
        oldest: Oldest supported version by package name.

    Raises:
        OldVersionError: A package is missing or too old; the message says how to upgrade it.
    """
    from packaging.version import Version

    for name, version in oldest.items():
        try:
            seen = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            seen = None
        if seen is None or Version(seen) < Version(version):
            raise OldVersionError(
                f"{name} {seen or 'is not installed'}; {version} or newer is needed; "
                f"run: pip install --upgrade '{name}>={version}'"
            )
