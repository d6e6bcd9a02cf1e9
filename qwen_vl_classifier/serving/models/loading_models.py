"""Load saved classifiers and panels into a set, each backbone once, in a thread beside the passes of those that serve.

Nothing here runs a pass of a backbone that serves. Those passes do not depend on what loading changes for a moment in
the whole process, torch's default type above all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.artifact import HEAD, MANIFEST, Manifest, read_manifest
from qwen_vl_classifier.classifier.average_picture import AVERAGE
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.own_backbone import check_room
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.panel_folder import PANEL_MANIFEST, PanelManifest, is_panel, read_panel
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from qwen_vl_classifier.files.digests import file_digest
from qwen_vl_classifier.serving.models.label_names import label_model
from qwen_vl_classifier.serving.models.model_set import ModelSet, Version
from qwen_vl_classifier.serving.models.panels import ServedPanel

_DIGITS = 12  # of a digest: enough to tell the versions of one classifier apart


def version_of(folder: Path) -> Version:
    """Return the version of a saved classifier or panel, by the content of its own files.

    A backbone or an adapter in the folder is not read: `classifier.json` holds the fingerprint of both.

    Raises:
        OSError: A file is missing or cannot be read.
    """
    found = hashlib.sha256()
    manifest = folder / MANIFEST
    if is_panel(folder):
        manifest = folder / PANEL_MANIFEST
        found.update(f"{PANEL_MANIFEST} {file_digest(manifest)}\n".encode())
        with suppress(ArtifactError):  # loading it says what is wrong with it
            for classifier in read_panel(folder).folders:
                _add_digests(found, classifier)
    else:
        _add_digests(found, folder)
    return Version(found.hexdigest()[:_DIGITS], int(manifest.stat().st_mtime))


def _add_digests(found: hashlib._Hash, classifier: Path) -> None:
    for name in (MANIFEST, HEAD, AVERAGE):
        if name != AVERAGE or (classifier / name).exists():
            found.update(f"{name} {file_digest(classifier / name)}\n".encode())


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
    contents: dict[str, _Content] = {}
    failures: dict[str, Exception] = {}
    for name, folder in folders.items():
        try:
            contents[name] = _read(folder)
        except ArtifactError as error:
            failures[name] = error
    for name in sorted(contents, key=lambda name: contents[name].depth, reverse=True):
        try:
            served = _with_model(served, name, folders[name], config)
        except Exception as error:
            failures[name] = error
    return served, failures


@dataclass(frozen=True, slots=True)
class _Content:
    """What a folder holds: one classifier, or those of a panel.

    Attributes:
        folders: Those of the classifiers.
        manifests: Of the same, in the same order.
        panel: The panel, or `None`.
    """

    folders: Sequence[Path]
    manifests: Sequence[Manifest]
    panel: PanelManifest | None = None

    @property
    def deepest(self) -> int:
        """The number of the classifier that reads the deepest layer."""
        return max(range(len(self.manifests)), key=lambda number: _depth(self.manifests[number].tap))

    @property
    def depth(self) -> float:
        """How deep that layer is."""
        return _depth(self.manifests[self.deepest].tap)


def _read(folder: Path) -> _Content:
    if not is_panel(folder):
        return _Content([folder], [read_manifest(folder)])
    panel = read_panel(folder)
    return _Content(panel.folders, [read_manifest(one) for one in panel.folders], panel)


def _depth(tap: Tap) -> float:
    return math.inf if tap.layer == LAST_NORM else tap.layer


def _with_model(served: ModelSet, name: str, folder: Path, config: ServeConfig) -> ModelSet:
    version, content = version_of(folder), _read(folder)
    deepest, manifest = content.folders[content.deepest], content.manifests[content.deepest]
    backbone = _loaded(served, manifest)
    if backbone is None and served.panels:  # or else the system might end those that serve
        check_room(deepest, manifest, config.device, config.model or None)
    first = Classifier.load(
        deepest,
        device=config.device,
        backbone=backbone,
        model=config.model or None,
        max_text_tokens=config.max_text_tokens or None,
    )
    loaded = [first if one == deepest else Classifier.load(one, backbone=first.backbone) for one in content.folders]
    if version_of(folder).digest != version.digest:
        raise ArtifactError(f"{folder}: it was replaced while it was read; try again")
    gone = served.classifiers_of(name)
    models = {other: model for other, model in served.models.items() if other not in gone}
    for other, model in models.items():
        if _may_share(model, first.backbone):
            models[other] = copy.copy(model)
            models[other].backbone = first.backbone
    saved = {
        other: _as_saved(panel, [models[label_model(other, label)] for label in panel.names])
        for other, panel in served.saved_panels.items()
        if other != name
    }
    if content.panel is None:
        models[name] = first
    else:
        models |= {label_model(name, label): one for label, one in zip(content.panel.names, loaded, strict=True)}
        saved[name] = _as_saved(content.panel, loaded)
    return ModelSet(_grouped(models, saved, served.panels), {**served.versions, name: version})


def _as_saved(panel: Panel | PanelManifest, classifiers: Sequence[Classifier]) -> Panel:
    """Return a saved panel with these classifiers, which is the same one if it has them already."""
    if isinstance(panel, Panel) and list(map(id, panel.classifiers)) == list(map(id, classifiers)):
        return panel
    return Panel(classifiers, names=panel.names, one_of=panel.one_of, temperature=panel.temperature)


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


def _grouped(
    models: Mapping[str, Classifier], saved: Mapping[str, Panel], before: Iterable[ServedPanel]
) -> list[ServedPanel]:
    """Group classifiers by backbone; a group that was there before keeps its panel, so that it keeps sharing passes."""
    groups: dict[int, dict[str, Classifier]] = {}
    for name, model in models.items():
        groups.setdefault(id(model.backbone), {})[name] = model
    saved_in: dict[int, dict[str, Panel]] = {backbone: {} for backbone in groups}
    for name, one in saved.items():
        saved_in[id(one.classifiers[0].backbone)][name] = one
    kept = [
        panel
        for panel in before
        if groups.get(id(panel.backbone)) == panel.classifiers and saved_in[id(panel.backbone)] == panel.saved
    ]
    known = {id(panel.backbone) for panel in kept}
    added = [ServedPanel(group, saved_in[key]) for key, group in groups.items() if key not in known]
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
