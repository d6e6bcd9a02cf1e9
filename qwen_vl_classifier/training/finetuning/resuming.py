"""The folder of a fine-tuning run, from which it resumes: its options, its checkpoints and its best state."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qwen_vl_classifier.classifier.artifact import check_replaceable
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ArtifactError, ConfigError, QwenVLClassifierError, TrainingError
from qwen_vl_classifier.files.bounded import check_tensor_file, read_json
from qwen_vl_classifier.files.room import check_apart, check_writable
from qwen_vl_classifier.files.whole import is_partial, write_file
from qwen_vl_classifier.images.identity import picture_identities

COMPLETE = "complete"
"""The file in a checkpoint that says that it was written to its end."""

WEIGHTS = "weights.safetensors"
BEST = "best"
VISION_TOKENS = "vision-tokens"

_KEPT = 2  # checkpoints
_WRITING = ("PytorchStreamWriter", "inline_container")  # in torch's own words, where torch.save fails
_RECORD = "run.json"
_OUT = "out"  # in the record: where the classifier is to go
_ENDED = "ended"  # in the record that replaces the options when the run has ended


def digest_of(examples: Sequence[Example]) -> str:
    """Return the SHA-256 over texts, labels and pictures, in hexadecimal; wherever the pictures lie."""
    digest = hashlib.sha256()
    identities = picture_identities([example.images for example in examples], lenient=True)
    for example, pictures in zip(examples, identities, strict=True):
        digest.update(b"".join(pictures))
        digest.update(json.dumps([example.text, example.label]).encode())
    return digest.hexdigest()


def check_folders(
    run: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    *,
    resume: bool = False,
    overwrite: bool = True,
    features: str | os.PathLike[str] | None = None,
) -> None:
    """Look at where run and result are to be, before any work: the first of all processes does, for all of them.

    Args:
        run: Folder of the run.
        out: Folder of the classifier.
        resume: Whether a run is to go on; what it finds in `out`, it has saved itself just before it was interrupted.
        overwrite: Whether another classifier in `out` may be replaced.
        features: Folder of the feature store.

    Raises:
        ConfigError: A folder cannot be written, or one lies in what is replaced; or the run cannot begin or go on.
        ArtifactError: `out` holds something else, or a classifier that may not be replaced.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if run is not None:
        check_run(Path(run), resume=resume)
        check_writable(Path(run))
    if out is not None:
        check_apart(Path(out), run=run, features=features)
        own = resume and run is not None and saves_to(Path(run), Path(out))
        check_replaceable(Path(out), overwrite=overwrite or own)
        check_writable(Path(out), replaced=True)


def check_run(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    """Check before any work that a run may begin or continue in a folder.

    Args:
        folder: Of the run.
        resume: As in `open_run`.

    Returns:
        The record of the run that it holds, if any.

    Raises:
        ConfigError: It holds something else, a run and `resume` is off, or one that has ended and `resume` is on.
    """
    path = folder / _RECORD
    before = _read(path)
    if before is None:
        if folder.exists() and (not folder.is_dir() or not all(is_partial(item.name) for item in folder.iterdir())):
            raise ConfigError(f"{folder}: exists and is not the folder of a run; give a new or empty folder")
    elif _ENDED in before:
        if resume:
            saved = f", and its classifier was saved in {before['saved']}" if before.get("saved") else ""
            raise ConfigError(
                f"{folder}: its run has ended{saved}; nothing is left to resume: leave out "
                f"{spelled('resume', True)} to train again"
            )
    elif not resume:
        checkpoints = sorted(_complete(folder), key=_step_of)
        at = f"stopped after step {_step_of(checkpoints[-1])}" if checkpoints else "that has just begun"
        raise ConfigError(
            f"{folder}: holds a run {at}; continue with {spelled('resume', True)}, or remove the folder to begin again"
        )
    return before


def open_run(folder: Path, record: dict[str, Any], *, resume: bool) -> Path | None:
    """Make the folder of a new run, or find where an old one continues.

    Args:
        folder: Of the run.
        record: All that decides what the run computes, and `out`, where its classifier is to go; JSON-able.
        resume: Go on with the run that the folder holds; where it holds none, begin. One that has ended is an error:
            whoever repeats a command until it is done must not train again from the first step.

    Returns:
        The last checkpoint that was written to its end, or `None` to begin.

    Raises:
        ConfigError: As `check_run`, or the run was started with other options.
    """
    before = check_run(folder, resume=resume)
    checkpoints = sorted(_complete(folder), key=_step_of)
    if before is None or _ENDED in before:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)  # of the run before, had it been killed just as it ended
        _write(folder / _RECORD, record)
        return None
    differing = sorted(key for key in (record.keys() | before.keys()) - {_OUT} if record.get(key) != before.get(key))
    if differing:
        raise ConfigError(
            f"{folder}: its run was started with another {', '.join(differing)}; give the same options and data, or "
            "remove the folder to begin again"
        )
    if record.get(_OUT) != before.get(_OUT):  # which does not change what is computed
        _write(folder / _RECORD, record)
    for path in folder.glob("checkpoint-*"):
        if path not in checkpoints:  # it would count among the last ones, which are kept
            shutil.rmtree(path)
    return checkpoints[-1] if checkpoints else None


def saves_to(folder: Path, out: Path) -> bool:
    """Tell whether a folder holds a run that is to save its classifier in `out`: what is there may be its own."""
    before = _read(folder / _RECORD)
    return before is not None and before.get(_OUT) == str(out.resolve())


def close_checkpoint(folder: Path, step: int) -> None:
    """Mark a checkpoint that was written to its end, and remove all but the last ones.

    transformers can remove them too, but goes by the times of the folders, and does so before the mark is there.
    """
    (folder / f"checkpoint-{step}" / COMPLETE).touch()
    for path in sorted(_complete(folder), key=_step_of)[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def close_run(folder: Path, saved: Path | None = None) -> None:
    """Remove what only a run that is under way needs; its course and its pages stay, and the next may begin here.

    Args:
        folder: Of the run.
        saved: Where its classifier was saved, if it was.
    """
    _write(folder / _RECORD, {_ENDED: True, "saved": None if saved is None else str(saved.resolve())})
    _clear(folder)


@contextmanager
def disk_advice(folder: str) -> Iterator[None]:
    """Turn a checkpoint that cannot be written, as on a full disk, into one line that says how to continue.

    Raises:
        TrainingError: It cannot.
    """
    try:
        yield
    except QwenVLClassifierError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _WRITING):
            raise
        raise TrainingError(
            f"{folder}: the run cannot be written ({reason}); make room or allow writing there, then continue from "
            f"the last checkpoint with {spelled('resume', True)}"
        ) from error


def load_trained_weights(model: nn.Module, folder: Path) -> None:
    """Put weights that `FinetuneTrainer` saved back into the model that they are of.

    Raises:
        ArtifactError: The file is missing or damaged, or its weights are not those that train.
    """
    path = folder / WEIGHTS
    try:
        check_tensor_file(path)
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: missing or damaged ({type(error).__name__}); remove the run's folder and begin again"
        ) from None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {name: tensor.shape for name, tensor in weights.items()} != {name: p.shape for name, p in trained.items()}:
        raise ArtifactError(f"{path}: weights of another model or method; remove the run's folder and begin again")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def bytes_of_run(trained: int, steps: int, save_steps: int) -> int:
    """Return how many bytes a run holds at most.

    Args:
        trained: Bytes of the weights that train.
        steps: Of the whole run.
        save_steps: Steps between checkpoints.
    """
    checkpoints = min(_KEPT + 1, steps // save_steps + 1)
    with_moments, best = 3 * trained, 2 * trained  # AdamW has two of each weight; a new best lies beside the old one
    return checkpoints * with_moments + best


def _clear(folder: Path) -> None:
    for path in [*folder.glob("checkpoint-*"), folder / BEST, folder / VISION_TOKENS]:
        shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: is not valid JSON; remove the folder to begin again")
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    write_file(path, json.dumps(record, indent=2) + "\n")


def _complete(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
