"""Take classifiers and panels apart into the classifiers that score a row, with a name of columns for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from qwen_vl_classifier.backbone.checkpoint.fingerprint import tensor_digest
from qwen_vl_classifier.classifier.artifact import Manifest, read_head_weights, read_manifest
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.panel_folder import PanelManifest, is_panel, read_panel
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.errors import ConfigError, shown
from qwen_vl_classifier.scoring.formats import NO_WORDS, Words, all_columns
from qwen_vl_classifier.scoring.scorers.exclusive_classes import ExclusiveClasses

Scorer: TypeAlias = "str | os.PathLike[str] | Classifier | Panel"
"""A saved classifier or panel by its folder, or one in memory."""


@dataclass(frozen=True, slots=True)
class ScorerList:
    """The classifiers that score a row; each label of a panel is one of them.

    Attributes:
        classifiers: The folder of each, or the classifier itself.
        names: The name of each, unlike all others: that of its label or folder, or its position.
        exclusive: Those that are classes of which a row has exactly one.
    """

    classifiers: tuple[Path | Classifier, ...]
    names: tuple[str, ...]
    exclusive: tuple[ExclusiveClasses, ...]

    @classmethod
    def of(cls, given: Scorer | Sequence[Scorer]) -> ScorerList:
        """Take apart what a caller gave.

        Raises:
            ArtifactError: A folder holds a panel that cannot be read.
            ConfigError: Nothing was given, or two columns would have the same name.
        """
        single = isinstance(given, (str, os.PathLike, Classifier, Panel))
        scorers: list[Scorer] = [given] if single else list(given)  # type: ignore[list-item, arg-type]
        if not scorers:
            raise ConfigError("no classifiers to score with: give at least one")
        classifiers: list[Path | Classifier] = []
        proposed: list[str] = []
        exclusive: list[ExclusiveClasses] = []
        for position, scorer in enumerate(scorers, start=1):
            panel = scorer if isinstance(scorer, Panel) else None if isinstance(scorer, Classifier) else _saved(scorer)
            own = _own_name(scorer, position)
            if isinstance(panel, (Panel, PanelManifest)) and panel.one_of:
                name = own if len(scorers) > 1 else ""
                exclusive.append(ExclusiveClasses(name, len(classifiers), panel.names, panel.temperature))
            if isinstance(panel, Panel):
                classifiers += panel.classifiers
            elif panel is not None:
                classifiers += [folder.resolve() for folder in panel.folders]
            else:
                assert not isinstance(scorer, Panel)
                classifiers.append(scorer if isinstance(scorer, Classifier) else Path(scorer).resolve())
            proposed += [own] if panel is None else panel.names
        found = cls(tuple(classifiers), tuple(_distinct(proposed)), tuple(exclusive))
        found._check_columns()
        return found

    @property
    def in_memory(self) -> bool:
        """Whether any of them is in this process, and nowhere else."""
        return any(isinstance(one, Classifier) for one in self.classifiers)

    def words(self) -> Words:
        """Return what each classifier calls its classes; nothing where none has words for them."""
        found = [(one if isinstance(one, Classifier) else read_manifest(one)).label_names for one in self.classifiers]
        named = [None if names == PLAIN_NAMES else names for names in found]
        return named if any(named) else NO_WORDS

    def fingerprints(self) -> list[str]:
        """Return for each classifier the SHA-256 of all that decides what it says, the same before saving and after."""
        return [_fingerprint(one) for one in self.classifiers]

    def panel(self, *, device: str, model: str | None, max_text_tokens: int | None) -> Panel:
        """Return all of them in this process; those in folders are loaded, with arguments as for `Panel.load`."""
        loaded: Iterator[Classifier] = iter(())
        folders = [one for one in self.classifiers if not isinstance(one, Classifier)]
        if folders:
            loaded = iter(Panel.load(folders, device=device, model=model, max_text_tokens=max_text_tokens).classifiers)
        return Panel([one if isinstance(one, Classifier) else next(loaded) for one in self.classifiers])

    def _check_columns(self) -> None:
        columns = all_columns(self.names, [("", " ")] * len(self.names), exclusive=self.exclusive)
        twice = [column for place, column in enumerate(columns) if column in columns[:place]]
        if twice:
            raise ConfigError(
                f"two columns of the scores would be called {shown(twice[0])}; rename a label, or the folder of a "
                "classifier"
            )


def _saved(folder: str | os.PathLike[str]) -> PanelManifest | None:
    return read_panel(folder) if is_panel(folder) else None


def _own_name(scorer: Scorer, position: int) -> str:
    """Name a classifier or panel by its folder, or by its position."""
    if isinstance(scorer, (Classifier, Panel)):
        return f"{'panel' if isinstance(scorer, Panel) else 'classifier'}{position}"
    return os.fsencode(Path(scorer).resolve().name).decode("utf-8", "replace")


def _distinct(proposed: Sequence[str]) -> list[str]:
    """Give names that are taken a number."""
    names: list[str] = []
    for name in proposed:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        names.append(next(free for free in numbered if free not in (*names, *proposed)) if name in names else name)
    return names


def _fingerprint(classifier: Path | Classifier) -> str:
    source: Classifier | Manifest
    if isinstance(classifier, Classifier):
        source = classifier
        backbone, head, weights = source.backbone.fingerprint, source.spec, source.head.state_dict()
    else:
        source = read_manifest(classifier)
        backbone, head, weights = (
            source.backbone["fingerprint"],
            source.head,
            read_head_weights(classifier, source.head),
        )
    record = {
        "backbone": backbone,
        "tap": str(source.tap),
        "head": head.kind,
        "weights": {name: tensor_digest(tensor.float()) for name, tensor in weights.items()},
        "temperature": float(source.temperature),
        "isotonic": source.isotonic,
        "threshold": float(source.threshold),
        "abstention": None if source.abstention is None else [float(end) for end in source.abstention],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
