"""Where the backbone of a saved classifier is now: where it was, or where the caller says."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_vl_classifier.classifier.artifact import BACKBONE, Manifest
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import CheckpointError


def backbone_place(
    folder: Path, manifest: Manifest, model: str | os.PathLike[str] | None
) -> tuple[str | Path, str | None]:
    """Return what `Backbone.load` takes as name and revision.

    The path of a folder that has gone is never taken for a name on the hub, where it may be a stranger's.

    Args:
        folder: Of the classifier.
        manifest: Its `classifier.json`.
        model: Where the backbone is now, `None` for where it was.

    Raises:
        CheckpointError: It was loaded from a folder, and there is no such folder.
    """
    saved = manifest.backbone
    if saved["finetuned"]:
        return folder / BACKBONE, None
    recorded = saved.get("folder")
    if recorded is None:
        if model is None or os.fspath(model) == saved["name"]:
            return saved["name"], saved["revision"]
        return os.fspath(model), None
    places = [Path(model).expanduser()] if model is not None else [Path(recorded), Path(saved["name"]).expanduser()]
    for place in places:
        if place.is_dir():
            return place, None
    tried = f"{model} is no folder" if model is not None else f"{saved['name']} is no folder here"
    raise CheckpointError(
        f"{folder}: its backbone was in {recorded}, and there is no such folder any more; {tried}; "
        f"say where it is now with {spelled('model')}"
    )
