"""The classifiers that are served at one moment: a request uses one such set to its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.serving.models.panels import ServedPanel


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a classifier.

    Attributes:
        digest: Of the files that decide what it answers, in hexadecimal and short.
        saved: When it was saved, in seconds since 1970.
    """

    digest: str
    saved: int


class ModelSet:
    """Classifiers by name. A set never changes: another one takes its place.

    Args:
        panels: The classifiers, grouped by backbone.
        versions: The version of each, by name, in the order in which they are listed.

    Attributes:
        panels: The same.
        versions: The same.
        models: The classifiers by name, in the same order.
    """

    def __init__(self, panels: Iterable[ServedPanel] = (), versions: Mapping[str, Version] | None = None) -> None:
        self.panels = tuple(panels)
        self.versions = dict(versions or {})
        loaded = {name: model for panel in self.panels for name, model in panel.classifiers.items()}
        self.models: dict[str, Classifier] = {name: loaded[name] for name in self.versions}

    @property
    def names(self) -> list[str]:
        """The names of the classifiers."""
        return list(self.models)

    def panel_of(self, name: str) -> ServedPanel:
        """Return the panel of a classifier."""
        (panel,) = (panel for panel in self.panels if name in panel.classifiers)
        return panel

    def panels_of(self, names: Sequence[str]) -> list[tuple[ServedPanel, tuple[str, ...]]]:
        """Return the panels of several classifiers, each with the names of those that are in it."""
        chosen = [(panel, tuple(name for name in names if name in panel.classifiers)) for panel in self.panels]
        return [(panel, some) for panel, some in chosen if some]

    def without(self, name: str) -> ModelSet:
        """Return the set of all other classifiers."""
        panels = [panel.without(name) if name in panel.classifiers else panel for panel in self.panels]
        versions = {other: version for other, version in self.versions.items() if other != name}
        return ModelSet([panel for panel in panels if panel is not None], versions)

    def in_order(self, names: Sequence[str]) -> ModelSet:
        """Return the same set, listed in this order and then by name."""
        order = {name: place for place, name in enumerate(names)}
        listed = sorted(self.versions, key=lambda name: (order.get(name, len(order)), name))
        return ModelSet(self.panels, {name: self.versions[name] for name in listed})
