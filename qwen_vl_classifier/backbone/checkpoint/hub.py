"""Find the folder of a backbone by name: built in, local, or on the Hugging Face hub."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from qwen_vl_classifier.backbone.checkpoint.adapter_layout import refuse_adapter
from qwen_vl_classifier.backbone.checkpoint.model import check_config
from qwen_vl_classifier.backbone.checkpoint.stored import read_json
from qwen_vl_classifier.backbone.checkpoint.weight_files import INDEX, WHOLE, indexed_files
from qwen_vl_classifier.config.spelling import did_you_mean
from qwen_vl_classifier.errors import CheckpointError

BUILTIN = {"builtin:tiny": Path(__file__).parents[1] / "tiny"}

_COMMIT = re.compile("[0-9a-f]{40}")
_SETTINGS = ["*.json", "*.txt", "*.jinja"]
_SUBFOLDERS = "*/*"  # steps of a training run, other formats


def locate(name: str, revision: str | None = None) -> Path:
    """Return the folder of a backbone, and fetch it from the hub if needed.

    Args:
        name: "builtin:tiny", a local folder, or a name on the hub such as "Qwen/Qwen2.5-VL-3B-Instruct".
        revision: Branch, tag or commit, for a name on the hub.

    Raises:
        CheckpointError: The backbone does not exist, or the hub cannot be reached; the message says which.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise CheckpointError(
                f"{name}: no such built-in backbone; expected {', '.join(BUILTIN)}{did_you_mean(name, BUILTIN)}"
            )
        return BUILTIN[name]
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError):  # no such home, a name that is too long, or a folder that may not be entered
        folder, is_folder, is_file = Path(name), False, False
    if is_folder:
        return folder
    if is_file:
        raise CheckpointError(f"{name}: this is a file; give the folder that holds the checkpoint")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(
            f"{name}: no such folder, and not a name on the hub either; "
            "give an existing folder, a name such as Qwen/Qwen2.5-VL-3B-Instruct, or builtin:tiny"
        )
    return _fetch(name, revision)


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in the hub's cache, or `None` for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def _fetch(name: str, revision: str | None) -> Path:
    """Fetch and check the settings, and only then fetch the weight files of the checkpoint."""
    folder = _download(name, revision, _SETTINGS, ignore=_SUBFOLDERS)
    refuse_adapter(folder, name)
    check_config(read_json(folder / "config.json", name), name)
    commit = commit_of(folder) or revision  # a branch may move in between
    if (folder / INDEX).exists():
        return _download(name, commit, ["config.json", *indexed_files(read_json(folder / INDEX, name), name)])
    folder = _download(name, commit, ["config.json", WHOLE])
    if (folder / WHOLE).exists():
        return folder
    return _download(name, commit, ["config.json", "*.safetensors"], ignore=_SUBFOLDERS)


def _download(name: str, revision: str | None, patterns: list[str], *, ignore: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignore))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access to it is restricted; request access on its page on the hub, then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the hub has no revision {revision!r} of it; check the name") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name}: the hub has no such model, or it is private; check the spelling, or run: hf auth login"
        ) from error
    except Exception as error:  # what else the hub's client raises depends on the HTTP library below it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise CheckpointError(
                f"{name}: cannot be written to the cache of the hub ({error.strerror}); free space, or set HF_HOME to "
                "a folder that can be written"
            ) from error
        raise CheckpointError(
            f"{name}: not on this machine, and the Hugging Face hub cannot be reached ({type(error).__name__}); "
            "check the connection and HF_HUB_OFFLINE, give a local folder, or use builtin:tiny, which needs no network"
        ) from error
