"""Read the features of rows once, and keep what is known of them apart from their labels.

`train` learns one label of them, `train_panel` several: what several labels of the same rows need is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.average_picture import average_of
from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example, shared_text
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.overlap import (
    Contents,
    alike_pairs,
    distinct_pictures,
    looks_of_pictures,
    row_hashes,
    sketch,
)
from qwen_vl_classifier.training.probe.fitting import FeatureRows
from qwen_vl_classifier.training.probe.random_rows import random_rows
from qwen_vl_classifier.training.splitting import RowNumbers, grouping_of, groups_of
from qwen_vl_classifier.training.weighting import row_weights

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What the record of a classifier says of its training rows, whatever their labels are.

    Attributes:
        examples: The rows.
        contents: Their texts and pictures.
        average: Their average picture, if they have any.
        data: Counts of distinct texts and pictures, and of pictures that look alike.
        sketch: Hashes of some of them.
        text: The text of all of them, if it is one.
    """

    examples: list[Example]
    contents: Contents
    average: Image.Image | None
    data: dict[str, Any]
    sketch: list[str]
    text: str | None

    @classmethod
    def of(cls, examples: list[Example]) -> RowFacts:
        """Look at texts and pictures; pictures that were encoded are not opened again."""
        contents = Contents.of(examples)
        looks, first_rows = looks_of_pictures(distinct_pictures(examples, contents.pictures))
        groups = groups_of(examples, pictures=contents.pictures)
        return cls(
            examples,
            contents,
            average_of(looks),
            {**contents.counts(), "alike": alike_pairs(looks, groups[first_rows].tolist())},
            sketch(row_hashes(examples, contents.pictures)),
            shared_text(examples),
        )


class ReadRows:
    """Rows whose features were read.

    Args:
        examples: The rows that can be used.
        features: Shape (n, taps, hidden).
        taps: Where they were read.
        config: Options.
        bad: The rows that cannot be used.
        given: How many rows were given, those included.

    Attributes:
        examples: The same.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        features: npt.NDArray[np.float32],
        taps: Sequence[Tap],
        config: TrainConfig,
        bad: BadRows,
        given: int,
    ) -> None:
        self.examples = examples
        self.left_out = [(bad, given)] if bad else []
        self._features, self._taps, self._config = features, taps, config
        self._known: dict[tuple[str, bytes], Any] = {}

    def labelled(self, rows: RowNumbers, targets: Float) -> FeatureRows:
        """Return some rows with their labels, as training takes them.

        Args:
            rows: Numbers of rows, rising.
            targets: Shape (rows,), labels or probabilities of class 1.

        Raises:
            DataError: An invalid weight, or no column says which rows were drawn at random.
        """
        chosen = self.some(rows)
        groups, across = self._once("groups", rows, lambda: grouping_of(chosen, self._config.group_by))
        return FeatureRows(
            self._taps,
            self._features if len(rows) == len(self.examples) else self._features[rows],
            targets,
            weights_of(chosen, targets, self._config),
            groups,
            across,
            random_rows(chosen, self._config.sampled_column),
        )

    def at(self, tap: Tap, rows: RowNumbers) -> npt.NDArray[np.float32]:
        """Return the features of some rows at one tap, shape (rows, hidden)."""
        found: npt.NDArray[np.float32] = self._features[rows, self._taps.index(tap)]
        return found

    def some(self, rows: RowNumbers) -> list[Example]:
        """Return the examples of some rows."""
        return [self.examples[row] for row in rows.tolist()]

    def facts(self, rows: RowNumbers) -> RowFacts:
        """Return what is known of some rows."""
        return self._once("facts", rows, lambda: RowFacts.of(self.some(rows)))

    def _once(self, what: str, rows: RowNumbers, compute: Callable[[], _T]) -> _T:
        key = what, rows.tobytes()
        if key not in self._known:
            self._known[key] = compute()
        found: _T = self._known[key]
        return found


@dataclass(frozen=True, slots=True)
class RowReader:
    """How examples become rows with features.

    Attributes:
        backbone: What reads the features.
        taps: Where; all of them come from one pass.
        config: Options.
        store: Where features are kept, if anywhere.
        progress: Show progress bars on what takes more than two seconds.
    """

    backbone: Backbone
    taps: Sequence[Tap]
    config: TrainConfig
    store: FeatureStore | None
    progress: bool

    def check(self, examples: Sequence[Example], bad: BadRows) -> None:
        """Read the headers of all pictures, before anything is computed.

        Raises:
            DataError: More rows cannot be used than the options allow.
        """
        read_sizes(examples, bad, progress=self.progress)
        bad.check(len(examples))

    def read(self, examples: Sequence[Example], bad: BadRows) -> ReadRows:
        """Read the features of all rows that can be used.

        Raises:
            DataError: More rows cannot be used than the options allow.
        """
        features = extract_features(
            examples, self.backbone, self.taps, store=self.store, bad=bad, progress=self.progress
        )
        bad.check(len(examples))
        return ReadRows(bad.without(examples), features, self.taps, self.config, bad, len(examples))


def bad_rows(config: TrainConfig, examples: Sequence[Example], what: str) -> BadRows:
    """Return what collects the rows of a data set that cannot be used.

    Args:
        config: Options.
        examples: The data set.
        what: What it is for, such as "training".
    """
    return BadRows(config.max_errors, what=f"{what} rows", can_leave_out=True, given=examples)


def weights_of(examples: Sequence[Example], targets: Float, config: TrainConfig) -> Float:
    """Return how much each row counts, shape (n,): its own weight times that of its class.

    Raises:
        DataError: A weight is missing or invalid.
    """
    return row_weights(examples, targets, column=config.weight_column, class_weight=config.class_weight)
