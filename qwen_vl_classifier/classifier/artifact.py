"""The saved classifier, format 1: a folder of JSON and safetensors, nothing pickled.

``classifier.json`` says everything but the weights; ``head.safetensors`` holds the head; ``backbone/`` is there only
where fine-tuning changed the backbone's own weights, ``adapter/`` only where it made an adapter; ``average.png`` only
where the average training picture is known (`average_picture.py`); ``README.md`` is a model card. Every field and
shape is checked on reading.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from qwen_vl_classifier.backbone.checkpoint.picture_settings import MOST_LARGEST, MOST_SMALLEST
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.average_picture import AVERAGE
from qwen_vl_classifier.classifier.calibration import MOST_KNOTS, Curve
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.classifier.model_card import model_card
from qwen_vl_classifier.classifier.panel_folder import PANEL_MANIFEST, is_panel, read_panel
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ArtifactError, ConfigError, first_of
from qwen_vl_classifier.files.bounded import parse_json, read_file, read_json
from qwen_vl_classifier.files.whole import new_folder, recover_folder

FORMAT_VERSION = 1
MANIFEST = "classifier.json"
HEAD = "head.safetensors"
BACKBONE = "backbone"
ADAPTER = "adapter"

# What may lie in the folder of a saved classifier, or beside the classifiers of a panel; anything else is somebody's,
# and saving must not delete it.
_BESIDE = {"README.md", "evaluation.json", "report.html"}
_OWN_FILES = {MANIFEST, HEAD, BACKBONE, ADAPTER, AVERAGE} | _BESIDE
_MOST_WEIGHTS = 2**26  # in one layer of a head: a small hostile file must not ask for all memory
_WEIGHT_BYTES = 8  # at most, in the file
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `classifier.json`.

    Attributes:
        backbone: name, revision, family, fingerprint, dtype and quantisation of the backbone; whether fine-tuning
            changed its own weights (then they lie in the folder's `backbone/`), and whether it has an adapter (then
            that lies in `adapter/`); and `folder`, the absolute path of the folder that it was loaded from, `null`
            for a name on the hub; `keeps_prompt`, whether the prompt is not the checkpoint's own; and `layers`, which
            decoder layers the tap needs, in words. Classifiers saved by older versions lack the last three.
        tap: Where features are read.
        pixel_limits: Fewest and most pixels of a picture after resizing.
        prompt: The chat template.
        head: The head's shape.
        label_names: What class 0 and class 1 are called.
        temperature: Divides the logits.
        isotonic: Knots of a curve through which the probability of class 1 then goes, in and out, or `None`.
        threshold: Probability of class 1 from which the label is 1.
        abstention: Band of probabilities in which `decide` abstains, or `None`.
        training: How it came about, for people to read.
        versions: Of this package and of the libraries that made it.
        reference: What a fixed example gives (`reference_feature.py`), or `None`; older versions did not write it.
    """

    backbone: dict[str, Any]
    tap: Tap
    pixel_limits: tuple[int, int]
    prompt: str
    head: HeadSpec
    label_names: tuple[str, str] = ("0", "1")
    temperature: float = 1.0
    isotonic: Curve | None = None
    threshold: float = 0.5
    abstention: tuple[float, float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reference: dict[str, str] | None = None

    @property
    def tuning(self) -> str:
        """Which part of the backbone was fine-tuned, in words."""
        parts = {"its own weights": self.backbone["finetuned"], "an adapter (LoRA)": self.backbone["adapter"]}
        return " and ".join(part for part, there in parts.items() if there) or "nothing"

    def to_json(self) -> dict[str, Any]:
        """Return the content of `classifier.json`."""
        content = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        content |= {"tap": str(self.tap), "head": dataclasses.asdict(self.head)}
        if self.isotonic is not None:
            content["isotonic"] = dict(zip(("in", "out"), map(list, self.isotonic), strict=True))
        if self.reference is None:
            del content["reference"]
        return {"format_version": FORMAT_VERSION, **content}

    @classmethod
    def from_json(cls, content: Any, *, source: str) -> Manifest:
        """Check the content of `classifier.json` field by field.

        Raises:
            ArtifactError: A field is missing, unknown or has an impossible value; the message names it.
        """
        if not isinstance(content, dict):
            raise ArtifactError(f"{source}: {MANIFEST} does not hold a JSON object; save the classifier again")
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ArtifactError(
                f"{source}: format_version {str(version)[:80]!r}, this package reads {FORMAT_VERSION}; "
                "upgrade qwen-vl-classifier, or train the classifier again"
            )
        fields = {item.name for item in dataclasses.fields(cls)}
        missing, unknown = (
            sorted(fields - content.keys() - _LATER_FIELDS),
            sorted(content.keys() - fields - {"format_version"}),
        )
        if missing or unknown:
            raise ArtifactError(
                f"{source}: {MANIFEST} lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}; "
                "save the classifier again"
            )
        for name, check, expected in _CHECKS:
            outer, _, inner = name.partition(".")
            value = content[outer].get(inner) if inner else content.get(outer)
            if not check(value):
                raise ArtifactError(
                    f"{source}: {MANIFEST} has {name} = {str(value)[:80]!r}; expected {expected}; "
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
            isotonic=_curve(content["isotonic"]),
            threshold=float(content["threshold"]),
            abstention=None if content["abstention"] is None else tuple(content["abstention"]),
            training=content["training"],
            versions=content["versions"],
            reference=content.get("reference"),
        )


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check `classifier.json` of a saved classifier.

    Raises:
        ArtifactError: The folder holds no classifier of this format.
    """
    recover_folder(Path(folder).resolve())
    try:
        content = read_json(Path(folder) / MANIFEST, inside=folder)
    except FileNotFoundError:
        if is_panel(folder):
            labels = read_panel(folder).folders
            raise ArtifactError(
                f"{folder}: holds a panel of {len(labels)} labels, expected one classifier; give the folder of one "
                f"label: {first_of(labels)}"
            ) from None
        raise ArtifactError(f"{folder}: no {MANIFEST} in it; give the folder of a saved classifier") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: {MANIFEST} cannot be read ({_reason(error)}); save the classifier again"
        ) from None
    return Manifest.from_json(content, source=str(folder))


def read_head_weights(folder: str | os.PathLike[str], spec: HeadSpec) -> dict[str, Tensor]:
    """Read the head's weights; `load_head_weights` checks their shapes.

    Args:
        folder: Of the saved classifier.
        spec: The head's shape, which bounds the size of the file.

    Raises:
        ArtifactError: The file is missing, damaged or too large.
    """
    path = Path(folder) / HEAD
    try:
        weights: dict[str, Tensor] = load(
            read_file(path, most=spec.num_weights * _WEIGHT_BYTES + _HEADER_BYTES, inside=folder)
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: the head's weights are missing or damaged ({_reason(error)}); save the classifier again"
        ) from None
    return weights


def write_manifest(folder: Path, manifest: Manifest, weights: Mapping[str, Tensor]) -> None:
    """Write `classifier.json`, the head and the model card into an existing folder.

    Raises:
        ArtifactError: A value that could not be read back, such as a threshold of 2; the message names it.
    """
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False)
    Manifest.from_json(parse_json(text), source="not saved")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / HEAD)
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    # A lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing(folder: Path, *, panel: bool = False) -> Iterator[Path]:
    """Yield a new folder to write to, which replaces `folder` if the block succeeds.

    Args:
        folder: Where a classifier, or a panel, is to be saved.
        panel: Whether it is a panel.

    Raises:
        ArtifactError: `folder` exists and is something else than a saved classifier or panel, or cannot be written.
    """
    folder = folder.resolve()  # what a link points to is replaced, not the link
    check_replaceable(folder, panel=panel)
    try:
        with new_folder(folder) as partial:
            yield partial
    except (OSError, SafetensorError) as error:  # the latter where a disk fills up while weights are written
        raise ArtifactError(
            f"{folder}: cannot be written ({_reason(error)}); give a folder that can be written, on a disk with room"
        ) from error


def check_replaceable(folder: Path, *, overwrite: bool = True, panel: bool = False) -> None:
    """Make sure that saving to a folder would delete nothing but an older classifier; call it before long work.

    Args:
        folder: Where a classifier, or a panel, is to be saved.
        overwrite: Whether an older one may be replaced.
        panel: Whether it is a panel: then only a panel may be replaced, and otherwise only a classifier.

    Raises:
        ArtifactError: `folder` exists and is something else than a saved classifier or panel, or holds more, or an
            older one that may not be replaced.
    """
    manifest, what = (PANEL_MANIFEST, "panel") if panel else (MANIFEST, "classifier")
    in_circle = ArtifactError(f"{folder}: is a link that leads back to itself; give another folder")
    try:
        target = folder.resolve()  # also where folders on the way are still to be made: NEW/../OLD
    except (OSError, RuntimeError):
        raise in_circle from None
    if any(part.is_symlink() for part in (target, *target.parents)):  # Python 3.13 leaves such links as they are
        raise in_circle
    recover_folder(target)
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    if names and manifest not in names:
        raise ArtifactError(f"{folder}: exists and is not a saved {what}; give a new or empty folder")
    inner = read_panel(target).folders if names and panel else ()
    others = sorted(names - ({manifest, *(one.name for one in inner)} | _BESIDE if panel else _OWN_FILES))
    if others:
        raise ArtifactError(
            f"{folder}: holds {others[0]!r} beside a saved {what}, and saving would delete it; "
            "move it away, or give a new folder"
        )
    if names and not overwrite:
        raise ArtifactError(
            f"{folder}: holds a saved {what}; give a new folder, or {spelled('overwrite', True)} to replace it"
        )
    for one in inner:
        check_replaceable(one)


def _reason(error: Exception) -> str:
    """Say why a file cannot be read, without its path."""
    return getattr(error, "strerror", None) or type(error).__name__


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_pair(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(check, value))


def _is_rising_pair(value: Any, check: Callable[[Any], bool]) -> bool:
    return _is_pair(value, check) and bool(value[0] <= value[1])


def _has_keys(value: Any, *names: str, optional: tuple[str, ...] = ()) -> bool:
    return isinstance(value, dict) and value.keys() - set(optional) == set(names)


def _is_curve(value: Any) -> bool:
    if not _has_keys(value, "in", "out") or not all(isinstance(knots, list) for knots in value.values()):
        return False
    inputs, outputs = value["in"], value["out"]
    return (
        1 <= len(inputs) == len(outputs) <= MOST_KNOTS
        and all(is_number(knot, 0, 1) for knot in (*inputs, *outputs))
        and all(low < high for low, high in pairwise(inputs))
        and all(low <= high for low, high in pairwise(outputs))
    )


def _curve(value: dict[str, list[float]] | None) -> Curve | None:
    return None if value is None else (tuple(map(float, value["in"])), tuple(map(float, value["out"])))


def _is_possible_head(value: dict[str, Any]) -> bool:
    units = value["units"] if value["kind"] == "mlp" else 1
    return bool(units >= 1 and value["hidden_size"] * units <= _MOST_WEIGHTS)


_LATER_FIELDS = {"reference"}
_LATER_BACKBONE_FIELDS = ("folder", "keeps_prompt", "layers")  # which older versions did not write
_BACKBONE_FIELDS = ("name", "revision", "family", "fingerprint", "dtype", "quantization", "finetuned", "adapter")

# In this order: a field is only looked into after its own kind has been checked.
_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "backbone",
        lambda value: _has_keys(value, *_BACKBONE_FIELDS, optional=_LATER_BACKBONE_FIELDS),
        f"an object of {', '.join(_BACKBONE_FIELDS)}",
    ),
    ("backbone.name", _is_text, "a text"),
    ("backbone.revision", lambda value: value is None or _is_text(value), "null or a text"),
    ("backbone.folder", lambda value: value is None or _is_text(value), "null or a text"),
    ("backbone.keeps_prompt", lambda value: value is None or isinstance(value, bool), "true or false"),
    ("backbone.layers", lambda value: value is None or _is_text(value), "null or a text"),
    ("backbone.family", lambda value: _is_text(value) and value in FAMILIES, f"one of {', '.join(FAMILIES)}"),
    (
        "backbone.fingerprint",
        lambda value: _is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None,
        "64 hexadecimal digits",
    ),
    ("backbone.dtype", lambda value: value in ("float32", "bfloat16"), "float32 or bfloat16"),
    ("backbone.quantization", lambda value: value in (None, "8bit", "4bit"), "null, 8bit or 4bit"),
    ("backbone.finetuned", lambda value: isinstance(value, bool), "true or false"),
    ("backbone.adapter", lambda value: isinstance(value, bool), "true or false"),
    ("tap", _is_text, "a tap such as mean:-1"),
    (
        "pixel_limits",
        lambda value: _is_rising_pair(value, lambda x: _is_whole(x, 1, MOST_LARGEST)) and value[0] <= MOST_SMALLEST,
        f"two whole numbers above 0, the smaller first, at most {MOST_SMALLEST:,} and {MOST_LARGEST:,}",
    ),
    ("prompt", _is_text, "a chat template"),
    (
        "head",
        lambda value: _has_keys(value, "kind", "hidden_size", "units", "dropout"),
        "an object of kind, hidden_size, units and dropout",
    ),
    ("head.kind", lambda value: value in ("linear", "mlp"), "linear or mlp"),
    ("head.hidden_size", lambda value: _is_whole(value, 1, 2**20), "a whole number above 0"),
    ("head.units", lambda value: _is_whole(value, 0, 2**20), "a whole number"),
    ("head.dropout", lambda value: is_number(value, 0, 0.999), "a number from 0 to below 1"),
    ("head", _is_possible_head, f"units above 0 for mlp, and at most {_MOST_WEIGHTS} weights in a layer"),
    ("label_names", lambda value: _is_pair(value, _is_text), "two texts"),
    ("temperature", lambda value: is_number(value, 1e-6, 1e6), "a number above 0"),
    (
        "isotonic",
        lambda value: value is None or _is_curve(value),
        f"null or an object of in and out, each the same number of rising numbers from 0 to 1, at most {MOST_KNOTS}",
    ),
    ("threshold", lambda value: is_number(value, 0, 1), "a number from 0 to 1"),
    (
        "abstention",
        lambda value: value is None or _is_rising_pair(value, lambda x: is_number(x, 0, 1)),
        "null or two numbers from 0 to 1, the smaller first",
    ),
    ("training", lambda value: isinstance(value, dict), "an object"),
    (
        "versions",
        lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
        "an object of texts",
    ),
    (
        "reference",
        lambda value: value is None or (_has_keys(value, "content", "feature") and all(map(_is_text, value.values()))),
        "null or an object of content and feature, both texts",
    ),
)
