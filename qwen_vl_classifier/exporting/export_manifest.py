"""`export.json`: what an exported folder contains, what is left to the client, how to serve it, expected answers.

Beside it lie `decision.json`, which a client applies to the engine's probability, and the pictures of the reference
examples. transformers reads a file of the name `decision.json` too, for models of its own kind: the names of its
settings (`labels`, `temperature`, `chat_template`, `noul_options`, `sanitize_control_tokens`, `adapter`) are not used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.files.bounded import read_json

FORMAT_VERSION = 1
MANIFEST = "export.json"
DECISION = "decision.json"


@dataclass(frozen=True, slots=True)
class ReferenceExample:
    """An example with the classifier's answer.

    Attributes:
        text: Its text.
        images: Its pictures: files in the exported folder, with / in their paths.
        tokens: How many tokens its prompt has.
        resized: Whether the engine has to resize a picture of it.
        probability: What the engine must answer for class 1.
        decision: What the client must make of it: "yes", "no" or "abstain".
    """

    text: str
    images: tuple[str, ...]
    tokens: int
    resized: bool
    probability: float
    decision: str


@dataclass(frozen=True, slots=True)
class ExportManifest:
    """The content of `export.json`.

    Attributes:
        target: The engine that it was exported for.
        classifier: Backbone, family, fingerprint and tap of the classifier.
        dtype: Type of the weights.
        tolerance: Largest difference of a probability that rounding explains.
        resized_tolerance: The same for examples with a picture that the engine resizes.
        label_names: What class 0 and class 1 are called.
        folded: Sentences: what of the classifier the files contain.
        left_to_client: The content of `decision.json`.
        differences: Sentences: where the engine does something else than this package.
        serve: Commands that start a server; the word FOLDER stands for the exported folder.
        ask: Commands that ask it.
        examples: What it must answer.
        versions: Of this package and of the libraries that made it.
    """

    target: str
    classifier: dict[str, Any]
    dtype: str
    tolerance: float
    resized_tolerance: float
    label_names: tuple[str, str]
    folded: tuple[str, ...]
    left_to_client: dict[str, Any]
    differences: tuple[str, ...]
    serve: tuple[str, ...]
    ask: tuple[str, ...]
    examples: tuple[ReferenceExample, ...]
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `export.json` and `decision.json` into an existing folder."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        for name, value in ((MANIFEST, content), (DECISION, self.left_to_client)):
            text = json.dumps(value, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def rules_of(classifier: Classifier, special_tokens: list[str], margin_offset: float) -> dict[str, Any]:
    """Return the content of `decision.json`.

    Args:
        classifier: The classifier.
        special_tokens: Texts that an engine would take for special tokens.
        margin_offset: What is to be added to the logit of class 1.

    Returns:
        `label_names`; `margin_offset`; `isotonic`, the knots `in` and `out` of a piecewise linear curve for the
        probability of class 1, or `null`; `threshold`; `abstention`, the band of probabilities, both ends included, or
        `null`; and `refused_in_texts`, as given.
    """
    isotonic = classifier.isotonic
    return {
        "label_names": list(classifier.label_names),
        "margin_offset": margin_offset,
        "isotonic": None if isotonic is None else dict(zip(("in", "out"), map(list, isotonic), strict=True)),
        "threshold": classifier.threshold,
        "abstention": None if classifier.abstention is None else list(classifier.abstention),
        "refused_in_texts": special_tokens,
    }


def read_export(folder: str | os.PathLike[str]) -> ExportManifest:
    """Read and check `export.json`.

    Raises:
        ArtifactError: The folder holds no exported classifier, or `export.json` is damaged.
    """
    try:
        content = read_json(Path(folder) / MANIFEST, inside=folder)
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {MANIFEST} in it; give a folder that export has written") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArtifactError(f"{folder}: {MANIFEST} cannot be read ({reason}); export the classifier again") from None
    names = {item.name for item in dataclasses.fields(ExportManifest)}
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION or names - content.keys():
        raise ArtifactError(
            f"{folder}: {MANIFEST} is not of format {FORMAT_VERSION}, or lacks fields; export the classifier again"
        )
    try:
        return _parsed({name: content[name] for name in names})
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{folder}: {MANIFEST} has fields of the wrong kind; export the classifier again") from None


def _parsed(content: dict[str, Any]) -> ExportManifest:
    """Return the manifest of checked fields.

    Raises:
        KeyError, TypeError, ValueError: A field has another kind of value.
    """
    for name in ("target", "dtype"):
        _check(isinstance(content[name], str))
    for name in ("classifier", "left_to_client", "versions"):
        _check(isinstance(content[name], dict))
    for name in ("label_names", "folded", "differences", "serve", "ask"):
        content[name] = _texts(content[name])
    for name in ("tolerance", "resized_tolerance"):
        _check(is_number(content[name], 0, 1))
    _check(len(content["label_names"]) == 2)
    _check(isinstance(content["examples"], list))
    content["examples"] = tuple(
        ReferenceExample(**{**row, "images": _texts(row["images"])}) for row in content["examples"]
    )
    for example in content["examples"]:
        _check(isinstance(example.text, str) and isinstance(example.decision, str))
        _check(is_number(example.probability, 0, 1) and isinstance(example.resized, bool))
        _check(is_number(example.tokens, 1, 1e9))
    return ExportManifest(**content)


def _texts(value: Any) -> tuple[str, ...]:
    _check(isinstance(value, list) and all(isinstance(item, str) for item in value))
    return tuple(value)


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError
