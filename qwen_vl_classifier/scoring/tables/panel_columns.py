"""The columns that a panel adds to a user's own table: the names that `score` gives them, in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.classifier.panel_folder import read_panel
from qwen_vl_classifier.data.example import PanelPrediction
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.errors import one_line
from qwen_vl_classifier.scoring.tables.own_table import Answer
from qwen_vl_classifier.scoring.tables.raw_tables import Cells

CLASS, CLASS_PROBABILITY = "class", "class_probability"


@dataclass(frozen=True, slots=True)
class PanelColumns:
    """What columns a panel adds.

    Each label has `probability_`, `label_` and `decision_` with its name behind, and one that has words for its classes
    `label_name_`. Classes of which a row has exactly one have a `probability_` each; `class` and `class_probability`
    say which is the likeliest.

    Attributes:
        names: Of the labels.
        one_of: Whether a row has exactly one of them.
        words: What class 0 and class 1 of each label are called.
    """

    names: Sequence[str]
    one_of: bool
    words: Sequence[tuple[str, str]]

    @classmethod
    def of_folder(cls, folder: str | Path) -> PanelColumns:
        """Return the columns of a saved panel; its weights are not read."""
        panel = read_panel(folder)
        return cls(panel.names, panel.one_of, [read_manifest(one).label_names for one in panel.folders])

    @property
    def added(self) -> list[str]:
        """The names of the columns, in their order."""
        probabilities = [f"probability_{name}" for name in self.names]
        if self.one_of:
            return [*probabilities, CLASS, CLASS_PROBABILITY]
        others = [f"{kind}_{name}" for kind in ("label", "decision") for name in self.names]
        return [*probabilities, *others, *(f"label_name_{name}" for name in self._with_words)]

    def of(self, prediction: PanelPrediction) -> Cells:
        """Return what the columns hold for one answer."""
        answers = list(prediction.labels.values())
        probabilities = [one.probability for one in answers]
        if self.one_of:
            return [*probabilities, prediction.label_name, prediction.probability]
        named: Mapping[str, str] = {name: prediction.labels[name].label_name for name in self._with_words}
        return [
            *probabilities,
            *(one.label for one in answers),
            *(one.decision for one in answers),
            *named.values(),
        ]

    def cells_of(self, answers: Sequence[Answer[PanelPrediction]], *, errors: bool) -> list[Cells]:
        """Return what the columns hold in each row, and with `errors` one more: why it cannot be used."""
        rows: list[Cells] = []
        for answer in answers:
            error = [one_line(answer.error) if answer.error else None] if errors else []
            made = answer.prediction
            rows.append([*(self.of(made) if made else [None] * len(self.added)), *error])
        return rows

    @property
    def _with_words(self) -> list[str]:
        # A label may be called "name_x" beside one called "x": its number keeps the column.
        return [
            name
            for name, words in zip(self.names, self.words, strict=True)
            if tuple(words) != PLAIN_NAMES and f"name_{name}" not in self.names
        ]
