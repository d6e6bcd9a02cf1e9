"""The saved panel, format 1: one `panel.json`, and a folder in format 1 of a classifier for each label.

``panel.json`` says which labels there are, in which folder each lies, and whether they are labels for themselves or
classes of which a row has exactly one; ``README.md`` is a card. Every field is checked on reading. Nothing here loads
torch: verbs tell a panel from a classifier before they load either.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import ArtifactError, shown
from qwen_vl_classifier.files.bounded import parse_json, read_json
from qwen_vl_classifier.files.whole import recover_folder

PANEL_MANIFEST = "panel.json"
PANEL_FORMAT = 1
MOST_LABELS = 1000
"""Labels of a panel."""

TEMPERATURES = (1e-6, 1e6)
"""Bounds of a temperature."""

_MOST_NAME = 128  # characters of a label's name
_MOST_FOLDER = 60  # characters of a folder's name, before what makes it distinct
_FOLDER = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")


@dataclass(frozen=True, slots=True)
class PanelManifest:
    """The content of `panel.json`.

    Attributes:
        names: What the labels are called, in the order of the columns of `Panel.predict_proba`.
        folders: Where the classifier of each label lies: folders inside that of the panel.
        one_of: Whether a row has exactly one of the labels.
        temperature: Of the probabilities of one of several classes, as in `one_of_probabilities`; else 1.
        training: How it came about, for people to read.
        versions: Of this package and of the libraries that made it.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    one_of: bool = False
    temperature: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `panel.json`."""
        labels = [{"name": name, "folder": folder.name} for name, folder in zip(self.names, self.folders, strict=True)]
        return {
            "format_version": PANEL_FORMAT,
            "one_of": self.one_of,
            "temperature": self.temperature,
            "labels": labels,
            "training": self.training,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, content: Any, *, folder: Path) -> PanelManifest:
        """Check the content of `panel.json` field by field.

        Args:
            content: What the file holds.
            folder: Of the panel.

        Raises:
            ArtifactError: A field is missing, unknown or has an impossible value; the message names it.
        """
        again = "save the panel again"
        if not isinstance(content, dict):
            raise ArtifactError(f"{folder}: {PANEL_MANIFEST} does not hold a JSON object; {again}")
        version = content.get("format_version")
        if type(version) is not int or version != PANEL_FORMAT:
            raise ArtifactError(
                f"{folder}: {PANEL_MANIFEST} has format_version {str(version)[:80]!r}, this package reads "
                f"{PANEL_FORMAT}; upgrade qwen-vl-classifier, or train the panel again"
            )
        missing = sorted(_CHECKS.keys() - content.keys())
        unknown = sorted(content.keys() - _CHECKS.keys() - {"format_version"})
        if missing or unknown:
            raise ArtifactError(
                f"{folder}: {PANEL_MANIFEST} lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}; "
                f"{again}"
            )
        for name, (check, expected) in _CHECKS.items():
            if not check(content[name]):
                raise ArtifactError(
                    f"{folder}: {PANEL_MANIFEST} has {name} = {str(content[name])[:80]!r}; expected {expected}; {again}"
                )
        names = [label["name"] for label in content["labels"]]
        if problem := names_problem(names):
            raise ArtifactError(f"{folder}: {PANEL_MANIFEST}: {problem}; {again}")
        folders = [label["folder"] for label in content["labels"]]
        if len(set(folders)) < len(folders):
            raise ArtifactError(f"{folder}: {PANEL_MANIFEST} has one folder for several labels; {again}")
        return cls(
            names=tuple(names),
            folders=tuple(_inner(folder, name) for name in folders),
            one_of=content["one_of"],
            temperature=float(content["temperature"]),
            training=content["training"],
            versions=content["versions"],
        )


def is_panel(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a saved panel, by its `panel.json`; it is not read."""
    return (Path(folder) / PANEL_MANIFEST).is_file()


def read_panel(folder: str | os.PathLike[str]) -> PanelManifest:
    """Read and check `panel.json` of a saved panel; the folders of its classifiers are not read.

    Raises:
        ArtifactError: The folder holds no panel of this format, or the folder of a label leads out of it.
    """
    recover_folder(Path(folder).resolve())
    try:
        content = read_json(Path(folder) / PANEL_MANIFEST, inside=folder)
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {PANEL_MANIFEST} in it; give the folder of a saved panel") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArtifactError(f"{folder}: {PANEL_MANIFEST} cannot be read ({reason}); save the panel again") from None
    return PanelManifest.from_json(content, folder=Path(folder))


def write_panel(folder: Path, manifest: PanelManifest) -> None:
    """Write `panel.json` into an existing folder, beside the folders of its classifiers.

    Raises:
        ArtifactError: A value that could not be read back; the message names it.
    """
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False)
    PanelManifest.from_json(parse_json(text), folder=folder)
    # A lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    (folder / PANEL_MANIFEST).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def names_problem(names: Sequence[object]) -> str:
    """Return why these cannot be the names of the labels of a panel, or "".

    A name is part of the address of a label in a server, of columns and of file names.

    Example:
        >>> names_problem(["defect", "dirty"]), names_problem(["a/b"])
        ('', "label 'a/b' holds a slash; expected a name without one")
    """
    if not names:
        return "no labels; expected at least one"
    if len(names) > MOST_LABELS:
        return f"{len(names):,} labels; expected at most {MOST_LABELS:,}"
    for name in names:
        if not isinstance(name, str) or not name.strip():
            return f"label {shown(name)}; expected a name"
        if len(name) > _MOST_NAME:
            return f"label {shown(name)} has {len(name):,} characters; expected at most {_MOST_NAME}"
        if "/" in name:
            return f"label {shown(name)} holds a slash; expected a name without one"
        if not name.isprintable():
            return f"label {shown(name)} holds characters that cannot be printed; expected a name in one line"
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    return f"two labels are called {shown(twice[0])}; expected different names" if twice else ""


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a safe name of a folder for each label: small letters, digits and dashes, all different.

    Example:
        >>> folder_names(["Defect", "../defect", "грязь"])
        ['defect', 'defect-2', 'label']
    """
    found: list[str] = []
    for name in names:
        plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:_MOST_FOLDER].strip("-") or "label"
        found.append(_distinct(plain, found))
    return found


def _distinct(name: str, taken: Collection[str]) -> str:
    number, distinct = 1, name
    while distinct in taken:
        number += 1
        distinct = f"{name}-{number}"
    return distinct


def _inner(folder: Path, name: str) -> Path:
    """Return a folder inside that of a panel.

    Raises:
        ArtifactError: It is a link that leads out of it.
    """
    inner = folder / name
    if not Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(folder)):
        raise ArtifactError(f"{inner}: is a link that leads out of the panel's folder; copy what it leads to")
    return inner


def _are_labels(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(label, dict)
        and label.keys() == {"name", "folder"}
        and isinstance(label["name"], str)
        and isinstance(label["folder"], str)
        and _FOLDER.fullmatch(label["folder"]) is not None
        for label in value
    )


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "one_of": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: is_number(value, *TEMPERATURES), "a number above 0"),
    "labels": (
        _are_labels,
        "a list of objects of name, a text, and folder, a name of small letters, digits, dashes and underscores",
    ),
    "training": (lambda value: isinstance(value, dict), "an object"),
    "versions": (
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
        "an object of texts",
    ),
}
