"""What the estimators of one process share: the backbone that was loaded last, and a folder of features.

scikit-learn clones an estimator for every fold and every combination of parameters. A clone knows the parameters and
nothing else, so whatever is to be read once for all of them lives here.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.errors import FeatureStoreError

MODEL_LOCK = threading.RLock()
"""Held by whoever fits or predicts: the threads of a process use the model one after the other."""

_loaded: dict[Hashable, Backbone] = {}  # at most one: two may not fit into the memory of a GPU
_features: list[Path] = []  # at most one


def shared_backbone(name: str, **options: Any) -> Backbone:
    """Return the backbone that was loaded last if it is the same, else load this one in its place.

    Args:
        name: As in `Backbone.load`.
        **options: As in `Backbone.load`.
    """
    key = (name, tuple(sorted(options.items())), _files_in(name))
    with MODEL_LOCK:
        if key not in _loaded:
            _loaded.clear()  # before loading: its memory is needed
            _loaded[key] = Backbone.load(name, **options)
        return _loaded[key]


def temporary_features() -> Path:
    """Return the folder in which this process keeps features until it ends; it is made when first needed.

    Raises:
        FeatureStoreError: It cannot be made.
    """
    with MODEL_LOCK:
        if not _features:
            try:
                folder = Path(tempfile.mkdtemp(prefix="qwen-vl-classifier-features-"))
            except OSError as error:
                raise FeatureStoreError(
                    f"no temporary folder for features ({error.strerror}); give features= a folder that can be written"
                ) from error
            _features.append(folder)
            atexit.register(_remove, folder, os.getpid())
        return _features[0]


def share_features(folder: Path) -> None:
    """Keep features where another process keeps them, unless this one has a folder already or that one is gone."""
    with MODEL_LOCK:
        if not _features and folder.is_dir():
            _features.append(folder)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process ends before its parent does
        shutil.rmtree(folder, ignore_errors=True)


def _files_in(name: str) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether the files of a checkpoint were replaced; nothing for one that is not a folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ()
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found)
