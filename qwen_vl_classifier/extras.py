"""Dependencies: optional ones are named when they are used, those that are too old before they break something."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from types import ModuleType

from qwen_vl_classifier.errors import MissingExtraError, OldVersionError

OLDEST = {"torch": "2.11", "transformers": "5.17", "pillow": "13"}
"""The oldest versions that work; also in pyproject.toml, which pip reads."""


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
    """Make sure that no dependency is too old; none of them is imported for it.

    Args:
        oldest: Oldest version by name.

    Raises:
        OldVersionError: One is missing or too old; the message says how to upgrade it.
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
