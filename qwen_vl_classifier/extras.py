"""Optional dependencies: named when they are used, never when the package is imported."""

from __future__ import annotations

import importlib
from types import ModuleType

from qwen_vl_classifier.errors import MissingExtraError


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
        if error.name != module.split(".", maxsplit=1)[0]:
            raise  # the module is there, and something that it needs is broken
        raise MissingExtraError(f"{module} is not installed; run: pip install 'qwen-vl-classifier[{extra}]'") from error
