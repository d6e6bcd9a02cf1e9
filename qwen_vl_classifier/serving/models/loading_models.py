"""Load saved classifiers into a set, each backbone once; it runs in a thread beside the passes of those that serve.

Nothing here runs a pass of a backbone that serves. Those passes do not depend on what loading changes for a moment in
the whole process, torch's default type above all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.artifact import HEAD, MANIFEST, Manifest, read_manifest
from qwen_vl_classifier.classifier.average_picture import AVERAGE
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.own_backbone import check_room
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from qwen_vl_classifier.files.digests import file_digest
from qwen_vl_classifier.serving.models.model_set import ModelSet, Version
from qwen_vl_classifier.serving.models.panels import ServedPanel

_DIGITS = 12  # of a digest: enough to tell the versions of one classifier apart


def version_of(folder: Path) -> Version:
    """Return the version of a saved classifier, by the content of its own files.

    A backbone or an adapter in the folder is not read: `classifier.json` holds the fingerprint of both.

    Raises:
        OSError: A file is missing or cannot be read.
    """
    found = hashlib.sha256()
    for name in (MANIFEST, HEAD, AVERAGE):
        if name != AVERAGE or (folder / name).exists():
            found.update(f"{name} {file_digest(folder / name)}\n".encode())
    return Version(found.hexdigest()[:_DIGITS], int((folder / MANIFEST).stat().st_mtime))


def load_models(
    served: ModelSet, folders: Mapping[str, Path], config: ServeConfig
) -> tuple[ModelSet, dict[str, Exception]]:
    """Add saved classifiers to a set, or replace those of the same names.

    A backbone that is loaded already is used again if it has the layers that a classifier reads. Otherwise one with
    more layers is loaded, and all classifiers of that backbone go over to it.

    Args:
        served: The set; it stays as it is.
        folders: By name.
        config: Where backbones are, and the device.

    Returns:
        A set with those that could be loaded, and for each of the others why not.
    """
    manifests: dict[str, Manifest] = {}
    failures: dict[str, Exception] = {}
    for name, folder in folders.items():
        try:
            manifests[name] = read_manifest(folder)
        except ArtifactError as error:
            failures[name] = error
    for name in sorted(manifests, key=lambda name: _depth(manifests[name].tap), reverse=True):
        try:
            served = _with_model(served, name, folders[name], config)
        except Exception as error:
            failures[name] = error
    return served, failures


def _depth(tap: Tap) -> float:
    return math.inf if tap.layer == LAST_NORM else tap.layer


def _with_model(served: ModelSet, name: str, folder: Path, config: ServeConfig) -> ModelSet:
    version, manifest = version_of(folder), read_manifest(folder)
    backbone = _loaded(served, manifest)
    if backbone is None and served.panels:  # or else the system might end those that serve
        check_room(folder, manifest, config.device, config.model or None)
    classifier = Classifier.load(
        folder,
        device=config.device,
        backbone=backbone,
        model=config.model or None,
        max_text_tokens=config.max_text_tokens or None,
    )
    if version_of(folder).digest != version.digest:
        raise ArtifactError(f"{folder}: it was replaced while it was read; try again")
    models = {**served.models, name: classifier}
    for other, model in served.models.items():
        if other != name and _may_share(model, classifier.backbone):
            models[other] = copy.copy(model)
            models[other].backbone = classifier.backbone
    return ModelSet(_grouped(models, served.panels), {**served.versions, name: version})


def _loaded(served: ModelSet, manifest: Manifest) -> Backbone | None:
    """Return the backbone of a saved classifier if it is loaded and deep enough.

    Only one of the very fingerprint is: for any other, loading would compare features, which takes a pass.
    """
    for panel in served.panels:
        if panel.backbone.fingerprint == manifest.backbone["fingerprint"] and _has(panel.backbone, manifest.tap):
            return panel.backbone
    return None


def _may_share(model: Classifier, backbone: Backbone) -> bool:
    """Tell whether a classifier can read another copy of its backbone."""
    return (
        model.backbone is not backbone
        and model.backbone.fingerprint == backbone.fingerprint
        and _has(backbone, model.tap)
    )


def _has(backbone: Backbone, tap: Tap) -> bool:
    try:
        backbone.check_taps([tap])
    except ConfigError:
        return False
    return True


def _grouped(models: Mapping[str, Classifier], before: Iterable[ServedPanel]) -> list[ServedPanel]:
    """Group classifiers by backbone; a group that was there before keeps its panel, so that it keeps sharing passes."""
    groups: dict[int, dict[str, Classifier]] = {}
    for name, model in models.items():
        groups.setdefault(id(model.backbone), {})[name] = model
    kept = [panel for panel in before if groups.get(id(panel.backbone)) == panel.classifiers]
    known = {id(panel.backbone) for panel in kept}
    added = [ServedPanel(group) for backbone, group in groups.items() if backbone not in known]
    for panel in added:
        panel.label_reader  # noqa: B018  (its files are read now)
    _share_processors(kept, added)
    return [*kept, *added]


def _share_processors(kept: Iterable[ServedPanel], added: Iterable[ServedPanel]) -> None:
    """Let panels whose processors do the same have the same one, so that its work is done once for all of them.

    A classifier on a backbone and one on a fine-tuned copy of it read the same tokens and patches. Panels that serve
    keep the processor that they have: requests in progress use it.
    """
    processors: dict[str, Processor] = {}
    for panel in kept:
        processors.setdefault(_key(panel.processor), panel.processor)
    for panel in added:
        panel.processor = processors.setdefault(_key(panel.processor), panel.processor)


def _key(processor: Processor) -> str:
    return json.dumps([processor.fingerprint(), processor.image_token_id, processor.video_token_id], sort_keys=True)
