"""What is served at one moment, classifiers and panels of labels: a request uses one such set to its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_vl_classifier.serving.models.label_names import label_model

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel import Panel
    from qwen_vl_classifier.serving.models.panels import ServedPanel

MOST_COUNTED = 100
"""So many labels of a saved panel have metrics of their own; those after them count together, as the panel."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a classifier or of a saved panel.

    Attributes:
        digest: Of the files that decide what it answers, in hexadecimal and short.
        saved: When it was saved, in seconds since 1970.
    """

    digest: str
    saved: int


class ModelSet:
    """Classifiers and saved panels by name. A set never changes: another one takes its place.

    Each label of a saved panel is a classifier too, whose name is that of `label_model`.

    Args:
        panels: The classifiers, grouped by backbone.
        versions: The version of each classifier and saved panel, by name, in the order in which they are listed.

    Attributes:
        panels: The same.
        versions: The same.
        models: The classifiers by name, in the same order, the labels of saved panels among them.
        saved_panels: The saved panels, by name.
    """

    def __init__(self, panels: Iterable[ServedPanel] = (), versions: Mapping[str, Version] | None = None) -> None:
        self.panels = tuple(panels)
        self.versions = dict(versions or {})
        self.saved_panels: dict[str, Panel] = {name: one for panel in self.panels for name, one in panel.saved.items()}
        loaded = {name: model for panel in self.panels for name, model in panel.classifiers.items()}
        self.models: dict[str, Classifier] = {
            model: loaded[model] for name in self.versions for model in self.classifiers_of(name)
        }
        self._uncounted = {
            label_model(name, label): name
            for name, panel in self.saved_panels.items()
            for label in panel.names[MOST_COUNTED:]
        }

    @property
    def names(self) -> list[str]:
        """The names of classifiers and saved panels, without the labels of these."""
        return list(self.versions)

    def classifiers_of(self, name: str) -> list[str]:
        """Return the names of the classifiers that a name stands for: of a saved panel those of its labels."""
        panel = self.saved_panels.get(name)
        return [name] if panel is None else [label_model(name, label) for label in panel.names]

    def listed_as(self, name: str) -> str:
        """Return the name by which a classifier is listed: a label by that of its saved panel."""
        return name if name in self.versions else name.partition("/")[0]

    def version_of(self, name: str) -> Version:
        """Return the version of a classifier or saved panel; a label has that of its panel."""
        return self.versions[self.listed_as(name)]

    def counted_as(self, name: str) -> str:
        """Return under which name the metrics count a classifier; see `MOST_COUNTED`."""
        return self._uncounted.get(name, name)

    def panel_of(self, name: str) -> ServedPanel:
        """Return the panel of a classifier or saved panel."""
        (panel,) = (panel for panel in self.panels if panel.has(name))
        return panel

    def panels_of(self, names: Sequence[str]) -> list[tuple[ServedPanel, tuple[str, ...]]]:
        """Return the panels of several classifiers and saved panels, each with the names of those that are in it."""
        chosen = [(panel, tuple(filter(panel.has, names))) for panel in self.panels]
        return [(panel, some) for panel, some in chosen if some]

    def without(self, name: str) -> ModelSet:
        """Return the set of all other classifiers and saved panels."""
        panels = [panel.without(name) if panel.has(name) else panel for panel in self.panels]
        versions = {other: version for other, version in self.versions.items() if other != name}
        return ModelSet([panel for panel in panels if panel is not None], versions)

    def in_order(self, names: Sequence[str]) -> ModelSet:
        """Return the same set, listed in this order and then by name."""
        order = {name: place for place, name in enumerate(names)}
        listed = sorted(self.versions, key=lambda name: (order.get(name, len(order)), name))
        return ModelSet(self.panels, {name: self.versions[name] for name in listed})
