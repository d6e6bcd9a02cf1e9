"""Read an API key: from a file of the user's own, else from a variable of the environment."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_vl_classifier.errors import ConfigError


def read_api_key(path: str, variable: str, *, option: str) -> bytes | None:
    """Return the key of the file if one is named, else that of the variable, else `None`.

    Args:
        path: The file, which may be a pipe; empty for none.
        variable: Name of the variable; an empty one counts as none.
        option: Name of the option that names the file, for messages. They never contain what was read.

    Raises:
        ConfigError: The file cannot be read, or what was read is not one key.
    """
    if not path:
        value = os.environ.get(variable, "")
        return _one_word(value.encode(errors="surrogateescape"), variable) if value else None
    where = f"{option} {path}"
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise ConfigError(f"{where}: it cannot be read ({reason}); give a file that holds the key") from None
    return _one_word(content, where)


def _one_word(content: bytes, where: str) -> bytes:
    key = content.strip()
    if not key or len(key.split()) > 1 or not key.isascii() or not key.decode().isprintable():
        raise ConfigError(
            f"{where}: it does not hold one key; expected one word of printable ASCII characters on one line"
        )
    return key
