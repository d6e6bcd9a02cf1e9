"""Read the JSON files of a checkpoint, and explain why a file cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwen_vl_classifier.errors import CheckpointError
from qwen_vl_classifier.files import bounded

_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype html", b"<html")
_SETTINGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_OPENED_BY_LIBRARIES = (".json", ".jinja", ".txt", ".model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_MOST_VOCABULARY = 32 << 20  # bytes: about three times the largest that is known


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of the checkpoint called `name`.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    try:
        content = bounded.read_json(path, most=_most_bytes(path), inside=path.parent)
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no {path.name} in it; give a folder in the hub's layout") from None
    except OSError as error:
        raise CheckpointError(
            f"{name}: its {path.name} cannot be read ({error.strerror}); give a folder in the hub's layout"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{name}: its {path.name} is not valid JSON ({why_unreadable(path, error)}); "
            "copy or download this file again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{name}: its {path.name} holds a JSON {type(content).__name__}, expected an object; "
            "copy or download this file again"
        )
    return content


def check_settings(folder: Path, name: str) -> None:
    """Check the files of settings and vocabularies that libraries will open by themselves.

    Raises:
        CheckpointError: One of them is no regular file, too large, or a link that leads out of the folder.
    """
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if path.suffix in _OPENED_BY_LIBRARIES and not path.is_dir():
            try:
                bounded.open_regular_file(path, most=_most_bytes(path), inside=folder).close()
            except OSError as error:
                raise CheckpointError(
                    f"{name}: its {path.name} cannot be read ({error.strerror}); give a folder in the hub's layout"
                ) from None


def refuse_malformed(folder: Path, name: str) -> None:
    """Check that the settings of tokeniser and image processor are valid JSON, to name the file that is not.

    Raises:
        CheckpointError: A file is malformed.
    """
    for file in _SETTINGS:
        if is_there(folder / file):
            read_json(folder / file, name)


def is_there(path: Path) -> bool:
    """Return whether a path exists; one that this process may not see counts as missing."""
    try:
        return path.exists()
    except OSError:
        return False


def why_unreadable(path: Path, error: Exception) -> str:
    """Explain why a file cannot be read: what it is instead, if that is known, else the reader's message."""
    try:
        with bounded.open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
    except OSError as failure:
        return failure.strerror or type(failure).__name__
    if size == 0:
        return "it is empty"
    if start.startswith(_POINTER):
        return "it is a Git LFS pointer: run git lfs pull"
    if start.lstrip().lower().startswith(_PAGES):
        return "it is an HTML page"
    return f"{size:,} bytes; {short_message(error)}"


def short_message(error: Exception) -> str:
    """Return the message of another library's error as one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _most_bytes(path: Path) -> int:
    return _MOST_VOCABULARY if path.name in _VOCABULARIES else bounded.MOST_JSON
