"""The saved classifier, format 1: a folder of JSON and safetensors, nothing pickled.

``classifier.json`` says everything but the weights; ``head.safetensors`` holds the head; ``backbone/`` is there only
where fine-tuning changed the backbone; ``README.md`` is a model card. Every field and shape is checked on reading.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import ArtifactError, ConfigError

FORMAT_VERSION = 1
MANIFEST = "classifier.json"
HEAD = "head.safetensors"
BACKBONE = "backbone"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `classifier.json` says.

    Attributes:
        backbone: name, revision, family, fingerprint and dtype of the backbone, and whether fine-tuning changed it
            (then its weights lie in the folder's `backbone/`).
        tap: Where features are read.
        pixel_limits: Fewest and most pixels of a picture after resizing.
        prompt: The chat template.
        head: The head's shape.
        label_names: What class 0 and class 1 are called.
        temperature: Divides the logits.
        threshold: Probability of class 1 from which the label is 1.
        abstention: Band of probabilities in which `decide` abstains, or `None`.
        training: How it came about, for people to read.
        versions: Of this package and of the libraries that made it.
    """

    backbone: dict[str, Any]
    tap: Tap
    pixel_limits: tuple[int, int]
    prompt: str
    head: HeadSpec
    label_names: tuple[str, str] = ("0", "1")
    temperature: float = 1.0
    threshold: float = 0.5
    abstention: tuple[float, float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `classifier.json`."""
        content = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        content |= {"tap": str(self.tap), "head": dataclasses.asdict(self.head)}
        return {"format_version": FORMAT_VERSION, **content}

    @classmethod
    def from_json(cls, content: Any, *, source: str) -> Manifest:
        """Check the content of `classifier.json` field by field.

        Raises:
            ArtifactError: A field is missing, unknown or has an impossible value; the message names it.
        """
        if not isinstance(content, dict):
            raise ArtifactError(f"{source}: {MANIFEST} holds no JSON object; save the classifier again")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{source}: format_version {version!r}, this package reads {FORMAT_VERSION}; "
                "upgrade qwen-vl-classifier, or train the classifier again"
            )
        fields = {item.name for item in dataclasses.fields(cls)}
        missing, unknown = (
            sorted(fields - content.keys()),
            sorted(content.keys() - fields - {"format_version"}),
        )
        if missing or unknown:
            raise ArtifactError(
                f"{source}: {MANIFEST} lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}; "
                "save the classifier again"
            )
        for name, check, wanted in _CHECKS:
            if not check(content[name]):
                raise ArtifactError(
                    f"{source}: {MANIFEST} has {name} = {str(content[name])[:80]!r}, wanted {wanted}; "
                    "save the classifier again"
                )
        try:
            tap = Tap.parse(content["tap"])
        except ConfigError as error:
            raise ArtifactError(f"{source}: {MANIFEST} has an impossible {error}") from None
        return cls(
            backbone=content["backbone"],
            tap=tap,
            pixel_limits=tuple(content["pixel_limits"]),
            prompt=content["prompt"],
            head=HeadSpec(**content["head"]),
            label_names=tuple(content["label_names"]),
            temperature=float(content["temperature"]),
            threshold=float(content["threshold"]),
            abstention=None if content["abstention"] is None else tuple(content["abstention"]),
            training=content["training"],
            versions=content["versions"],
        )


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check `classifier.json` of a saved classifier.

    Raises:
        ArtifactError: The folder holds no classifier of this format.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {MANIFEST} in it; give the folder of a saved classifier") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}); save the classifier again"
        ) from None
    return Manifest.from_json(content, source=str(folder))


def read_head_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the head's weights; `load_head_weights` checks their shapes.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    path = Path(folder) / HEAD
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: the head's weights are missing or damaged ({type(error).__name__}); save the classifier again"
        ) from None
    return weights


def write_manifest(folder: Path, manifest: Manifest, weights: Mapping[str, Tensor]) -> None:
    """Write `classifier.json`, the head and the model card into an existing folder."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / HEAD)
    (folder / "README.md").write_text(_model_card(manifest), encoding="utf-8")
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder to write to, which takes the place of `folder` when all went well.

    Raises:
        ArtifactError: `folder` exists and is something else than a saved classifier, or cannot be written.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: exists and is no saved classifier; give a new or empty folder")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                old = partial.with_suffix(".old")
                folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old)
            else:
                partial.rename(folder)
        except OSError as error:
            raise ArtifactError(
                f"{folder}: cannot be written ({error.strerror or type(error).__name__}); "
                "give a folder that can be written, on a disk with room"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_backbone(value: Any) -> bool:
    wanted = {"name": str, "revision": (str, type(None)), "family": str, "fingerprint": str, "dtype": str}
    wanted["finetuned"] = bool
    return (
        isinstance(value, dict)
        and value.keys() == wanted.keys()
        and all(isinstance(value[name], kind) for name, kind in wanted.items())  # type: ignore[arg-type]
    )


def _is_head(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"kind", "hidden_size", "units", "dropout"}
        and value["kind"] in ("linear", "mlp")
        and type(value["hidden_size"]) is int
        and 1 <= value["hidden_size"] <= 2**20
        and type(value["units"]) is int
        and (1 if value["kind"] == "mlp" else 0) <= value["units"] <= 2**20
        and _is_number(value["dropout"], 0, 0.999)
    )


def _is_pair(value: Any, check: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(check, value))


_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("backbone", _is_backbone, "name, revision, family, fingerprint, dtype and finetuned"),
    ("tap", lambda value: isinstance(value, str), "a tap such as mean:-1"),
    (
        "pixel_limits",
        lambda value: _is_pair(value, lambda x: type(x) is int and x > 0),
        "two whole numbers above 0",
    ),
    ("prompt", lambda value: isinstance(value, str), "a chat template"),
    ("head", _is_head, "kind, hidden_size, units and dropout"),
    ("label_names", lambda value: _is_pair(value, lambda x: isinstance(x, str)), "two texts"),
    ("temperature", lambda value: _is_number(value, 1e-6, 1e6), "a number above 0"),
    ("threshold", lambda value: _is_number(value, 0, 1), "a number from 0 to 1"),
    (
        "abstention",
        lambda value: value is None or (_is_pair(value, lambda x: _is_number(x, 0, 1)) and value[0] <= value[1]),
        "null or two numbers from 0 to 1",
    ),
    ("training", lambda value: isinstance(value, dict), "an object"),
    (
        "versions",
        lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
        "an object of texts",
    ),
)


def _model_card(manifest: Manifest) -> str:
    training = "\n".join(
        f"| {name} | {json.dumps(value, ensure_ascii=False).replace('|', chr(92) + '|')} |"
        for name, value in manifest.training.items()
        if not isinstance(value, (list, dict))
    )
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return f"""# Binary classifier of image + text

Class 1 is "{manifest.label_names[1]}", class 0 is "{manifest.label_names[0]}".

| | |
|---|---|
| backbone | {manifest.backbone["name"]} ({manifest.backbone["family"]}, {manifest.backbone["dtype"]}) |
| tap | {manifest.tap} |
| head | {manifest.head.kind} |
| threshold | {manifest.threshold:g} |
| temperature | {manifest.temperature:g} |
{training}

Made with {versions}.

Use it:

```python
from qwen_vl_classifier import Classifier, Example

classifier = Classifier.load("path/to/this/folder")
classifier.predict_proba([Example("photo.jpg", "the text that goes with it")])
```
"""
