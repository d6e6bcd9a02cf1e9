"""Find the backbone of a saved classifier, and check that it is the one the classifier was made with."""

from __future__ import annotations

import os
from pathlib import Path

import transformers

from qwen_vl_classifier.backbone.adapters import read_adapter, read_adapter_settings
from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.checkpoint.hub import locate
from qwen_vl_classifier.backbone.checkpoint.model import loaded_bytes
from qwen_vl_classifier.backbone.devices import choose_devices, choose_dtype, free_memory, spelled_devices
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.classifier.artifact import ADAPTER, BACKBONE, Manifest
from qwen_vl_classifier.classifier.reference_feature import distance, tolerance
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ArtifactError, CheckpointError, OutOfMemoryError


def load_backbone(
    folder: Path,
    manifest: Manifest,
    device: str,
    model: str | os.PathLike[str] | None,
    max_text_tokens: int | None,
) -> Backbone:
    """Load the backbone of a saved classifier, no deeper than it reads.

    Args:
        folder: Of the classifier.
        manifest: Its `classifier.json`.
        device: As in `Backbone.load`.
        model: Where the backbone is now, `None` for where it was.
        max_text_tokens: As in `Backbone.load`.

    Raises:
        CheckpointError: It cannot be loaded.
        ArtifactError: Its adapter cannot be read.
        MissingExtraError: It has an adapter or is quantised, and what that needs is not installed.
    """
    saved = manifest.backbone
    source, revision = _source_of(folder, manifest, model)
    backbone = Backbone.load(
        source,
        device=device,
        dtype=saved["dtype"],
        num_layers=_depth(folder, manifest),
        min_pixels=manifest.pixel_limits[0],
        max_pixels=manifest.pixel_limits[1],
        revision=revision,
        quantization=saved["quantization"],
        chat_template=manifest.prompt if saved.get("keeps_prompt") else None,
        max_text_tokens=max_text_tokens,
    )
    if saved["adapter"]:
        read_adapter(backbone, folder / ADAPTER)
    return backbone


def check_room(folder: Path, manifest: Manifest, device: str, model: str | os.PathLike[str] | None) -> None:
    """Make sure that the backbone of a saved classifier fits beside what is in memory, before any of it is loaded.

    Where memory is short, the system would rather end the process than refuse it.

    Args:
        folder: Of the classifier.
        manifest: Its `classifier.json`.
        device: As in `Backbone.load`.
        model: Where the backbone is now, `None` for where it was.

    Raises:
        CheckpointError: The backbone cannot be found.
        OutOfMemoryError: It does not fit.
    """
    saved, devices = manifest.backbone, choose_devices(device)
    source, revision = _source_of(folder, manifest, model)
    needed = loaded_bytes(
        locate(str(source), revision),
        str(source),
        _depth(folder, manifest),
        choose_dtype(saved["dtype"], devices),
        saved["quantization"],
    )
    free = sum(map(free_memory, devices))
    if needed > free:
        raise OutOfMemoryError(
            f"{folder}: its backbone takes {needed / 1e9:.1f} GB beside what is loaded, and {free / 1e9:.1f} GB are "
            f"free on {spelled_devices(devices)}; free memory, or restart with this version"
        )


def _depth(folder: Path, manifest: Manifest) -> int | None:
    """Return how many layers of its backbone a saved classifier needs, `None` for all."""
    if manifest.tap.layer == LAST_NORM:
        return None
    if manifest.backbone["adapter"]:  # which may reach deeper than the tap, and is loaded whole or not at all
        return max(manifest.tap.layer, read_adapter_settings(folder / ADAPTER).depth)
    return manifest.tap.layer


def check_backbone(backbone: Backbone, manifest: Manifest, folder: Path) -> None:
    """Make sure that a backbone is the one that a saved classifier was made with.

    Args:
        backbone: As it is here.
        manifest: `classifier.json` of the classifier.
        folder: Of the classifier.

    Raises:
        ArtifactError: It is another one, or computes something else.
        ConfigError: It has no such tap.
    """
    saved = manifest.backbone["fingerprint"]
    if manifest.head.hidden_size != backbone.hidden_size and backbone.fingerprint == saved:
        raise ArtifactError(
            f"{folder}: the head expects features of width {manifest.head.hidden_size}, "
            f"{backbone.name} gives {backbone.hidden_size}; save the classifier again"
        )
    backbone.check_taps([manifest.tap])
    if backbone.fingerprint == saved:
        return
    seen = distance(manifest.reference, backbone, manifest.tap)
    if seen is None:
        raise ArtifactError(
            f"{folder}: made with backbone {manifest.backbone['name']} of fingerprint {saved[:12]}, but "
            f"{backbone.name} here has {backbone.fingerprint[:12]}: weights, adapter, quantisation, prompt, pixel "
            "limits, dtype or the major version of transformers differ; load the same backbone, or train the "
            "classifier again"
        )
    if not seen <= tolerance(backbone):
        made, here = manifest.versions.get("transformers"), transformers.__version__
        raise ArtifactError(
            f"{folder}: made with transformers {made}; with {here}, the same backbone gives a feature that differs by "
            f"{seen:.3g} of its length, expected at most {tolerance(backbone):g}; install transformers {made}, or "
            "train the classifier again"
        )


def _source_of(folder: Path, manifest: Manifest, model: str | os.PathLike[str] | None) -> tuple[str | Path, str | None]:
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
    folders = [Path(model).expanduser()] if model is not None else [Path(recorded), Path(saved["name"]).expanduser()]
    for candidate in folders:
        if candidate.is_dir():
            return candidate, None
    tried = f"{model} is not a folder" if model is not None else f"{saved['name']} is not a folder here"
    raise CheckpointError(
        f"{folder}: its backbone was in {recorded}, which no longer exists; {tried}; "
        f"give its new path with {spelled('model')}"
    )
