"""The folder of a fine-tuning run: what it was asked to do, its checkpoints, its best state and its course."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.identity import picture_identities
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.whole import is_partial, write_file

COMPLETE = "complete"
"""The file in a checkpoint that says that it was written to its end."""

_KEPT = 2  # checkpoints
_RECORD = "run.json"
_ENDED = {"ended": True}  # in place of what was asked


def digest_of(examples: Sequence[Example]) -> str:
    """Return the SHA-256 over texts, labels and pictures, in hexadecimal; wherever the pictures lie."""
    digest = hashlib.sha256()
    for example, pictures in zip(examples, picture_identities(examples, lenient=True), strict=True):
        digest.update(b"".join(pictures))
        digest.update(json.dumps([example.text, example.label]).encode())
    return digest.hexdigest()


def open_run(folder: Path, record: dict[str, Any], *, resume: bool) -> Path | None:
    """Make the folder of a new run, or find where an old one is to go on.

    Args:
        folder: Of the run.
        record: All that decides what the run computes; JSON-able.
        resume: Go on with the run that the folder holds; where it holds none, begin.

    Returns:
        The last checkpoint that was written to its end, or `None` to begin.

    Raises:
        ConfigError: The folder holds a run and `resume` is off, or one that was asked to do something else.
    """
    path = folder / _RECORD
    checkpoints = sorted(_complete(folder), key=_step_of)
    before = _read(path)
    if before is None or before == _ENDED:
        if before is None and folder.is_dir() and not all(is_partial(item.name) for item in folder.iterdir()):
            raise ConfigError(f"{folder}: exists and is no folder of a run; give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)  # of the run before, had it been killed just as it ended
        _write(path, record)
        return None
    if not resume:
        at = f"stopped after step {_step_of(checkpoints[-1])}" if checkpoints else "that has just begun"
        raise ConfigError(f"{folder}: holds a run {at}; go on with --resume, or remove the folder to begin again")
    differing = sorted(key for key in record.keys() | before.keys() if record.get(key) != before.get(key))
    if differing:
        raise ConfigError(
            f"{folder}: its run was asked with another {', '.join(differing)}; ask as before, or remove the folder to "
            "begin again"
        )
    for path in folder.glob("checkpoint-*"):
        if path not in checkpoints:  # it would count among the last ones, which are kept
            shutil.rmtree(path)
    return checkpoints[-1] if checkpoints else None


def holds_run(folder: Path) -> bool:
    """Tell whether a folder is that of a run, under way or ended."""
    return (folder / _RECORD).is_file()


def close_checkpoint(folder: Path, step: int) -> None:
    """Mark a checkpoint that was written to its end, and remove all but the last ones.

    transformers can remove them too, but goes by the times of the folders, and does so before the mark is there.
    """
    (folder / f"checkpoint-{step}" / COMPLETE).touch()
    for path in sorted(_complete(folder), key=_step_of)[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def close_run(folder: Path) -> None:
    """Remove what only a run that is under way needs; its course and its pages stay, and the next may begin here."""
    _write(folder / _RECORD, _ENDED)
    _clear(folder)


def _clear(folder: Path) -> None:
    for path in [*folder.glob("checkpoint-*"), folder / "best"]:
        shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{path}: is not valid JSON; remove the folder to begin again") from None
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    write_file(path, json.dumps(record, indent=2) + "\n")


def _complete(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
