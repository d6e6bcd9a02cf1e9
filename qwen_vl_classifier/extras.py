"""Import optional dependencies with an error that names the extra, and check that no dependency is too old."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from types import ModuleType

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
        raise MissingExtraError(
            f"{error.name} is not installed; run: pip install 'qwen-vl-classifier[{extra}]'"
        ) from error


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
