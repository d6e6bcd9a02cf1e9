"""Change the threshold of a classifier: in its training record, or in a saved folder without its backbone."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_classifier.classifier.artifact import (
    ADAPTER,
    BACKBONE,
    read_head_weights,
    read_manifest,
    replacing,
    write_manifest,
)
from qwen_vl_classifier.classifier.average_picture import AVERAGE
from qwen_vl_classifier.classifier.head import load_head_weights
from qwen_vl_classifier.classifier.model_card import panel_card
from qwen_vl_classifier.classifier.panel_folder import is_panel, read_panel
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from qwen_vl_classifier.files.whole import write_file
from qwen_vl_classifier.objectives import Objective

SET_BY_HAND = "set by hand"
"""What a training record has in place of an objective, for a threshold that no objective chose."""


def checked_threshold(value: object) -> float:
    """Return a threshold as a float.

    Raises:
        ConfigError: It is not a number from 0 to 1.
    """
    if not is_number(value, 0, 1):
        raise ConfigError(f"threshold is {value!r}; expected a number from 0 to 1")
    return float(value)  # type: ignore[arg-type]  # it is a number


def record_at_threshold(training: Mapping[str, Any], threshold: float, objective: str | None = None) -> dict[str, Any]:
    """Return a training record for another threshold.

    Estimates of accuracy become unknown, and the abstention band goes: both hold for the threshold before only.

    Args:
        training: The record before.
        threshold: The new threshold.
        objective: What it was chosen for; `None` where it was set by hand.

    Raises:
        ConfigError: The objective is malformed.
    """
    changed = {name: value for name, value in training.items() if name != "abstention"}
    for name in ("estimate", "estimate_new_texts"):
        if isinstance(estimate := changed.get(name), dict):
            changed[name] = estimate | {"accuracy": dict.fromkeys(("mean", "low", "high"))}
    chosen_for = SET_BY_HAND if objective is None else str(Objective.parse(objective))
    return changed | {"threshold": {"objective": chosen_for, "threshold": threshold}}


def threshold_was_set(training: Mapping[str, Any]) -> bool:
    """Tell whether a threshold was set by hand, by the training record of its classifier."""
    entry = training.get("threshold")
    return isinstance(entry, dict) and entry.get("objective") == SET_BY_HAND


def copy_at_threshold(folder: str | os.PathLike[str], out: str | os.PathLike[str], threshold: float) -> Path:
    """Copy a saved classifier with another threshold; its backbone is not loaded.

    Reports that lie in the folder are not copied: they hold for the threshold before.

    Returns:
        The new folder.

    Raises:
        ConfigError: The threshold is not a number from 0 to 1.
        ArtifactError: `folder` holds no sound classifier, or `out` holds something else or cannot be written.
    """
    folder, out, threshold = Path(folder), Path(out), checked_threshold(threshold)
    manifest = read_manifest(folder)
    head = manifest.head.build()
    load_head_weights(head, read_head_weights(folder, manifest.head), source=str(folder))
    changed = dataclasses.replace(
        manifest,
        threshold=threshold,
        abstention=None,
        training=record_at_threshold(manifest.training, threshold),
    )
    with replacing(out) as partial:
        for name in (BACKBONE, ADAPTER):
            if (folder / name).is_dir():
                shutil.copytree(folder / name, partial / name, symlinks=True)
        if (folder / AVERAGE).is_file():
            shutil.copyfile(folder / AVERAGE, partial / AVERAGE, follow_symlinks=False)
        write_manifest(partial, changed, head.state_dict())
    return out


def panel_around(folder: Path) -> Path | None:
    """Return the saved panel of which a folder is the classifier of one label, or `None`.

    Raises:
        ArtifactError: The folder above it holds a panel that cannot be read.
    """
    inner = folder.resolve()
    if not is_panel(inner.parent):
        return None
    names = {one.name for one in read_panel(inner.parent).folders}
    return inner.parent if inner.name in names else None


def renew_panel_card(panel: Path) -> None:
    """Write the `README.md` of a saved panel again, after a classifier in it has changed.

    Raises:
        ArtifactError: The panel or a classifier in it cannot be read, or the file cannot be written.
    """
    manifest = read_panel(panel)
    card = panel_card(manifest, [read_manifest(folder) for folder in manifest.folders])
    try:
        write_file(panel / "README.md", card.encode())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArtifactError(
            f"{panel}: README.md cannot be written ({reason}), the panel itself is fine; make the folder writable"
        ) from error
