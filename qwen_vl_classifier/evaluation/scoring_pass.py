"""Compute all that an evaluation needs from the pictures in one pass, which opens each picture once.

While a picture is there, its rows are scored, and so are the rows that a check gives this picture or another text about
it. What later shows a picture gets its thumbnail from here, and its identity and looks from `images/identity.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.backbone.windows import windows
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.probabilities import check_numbers
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.checks import Altered
from qwen_vl_classifier.evaluation.metrics import Probabilities
from qwen_vl_classifier.evaluation.report.pictures import SIDE
from qwen_vl_classifier.features.reader import FeatureReader, Features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.images.identity import stamp_of
from qwen_vl_classifier.images.thumbnails import thumbnail

_THUMBNAIL_BYTES = 64_000_000  # of all that are held during the pass: about five thousand photographs


@dataclass(slots=True)
class ThumbnailKeeper:
    """Makes thumbnails while pictures are open, as many as it may hold; safe in several threads.

    Attributes:
        side: Longer side of a thumbnail, in pixels.
        made: By the stamp of a picture's source.
    """

    side: int = SIDE
    made: dict[bytes, dict[str, Any]] = field(default_factory=dict)
    _held: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, stamp: bytes, picture: Image.Image) -> None:
        """Make the thumbnail of a picture that was just opened."""
        if self._held < _THUMBNAIL_BYTES and stamp not in self.made:
            made = thumbnail(picture, self.side)
            with self._counting:
                self.made[stamp] = made
                self._held += len(made["content"])

    def of(self, example: Example) -> list[dict[str, Any]] | None:
        """Return the thumbnails of an example; `None` where not all of them were made."""
        stamps = [stamp_of(source) for source in example.images]
        return [self.made[stamp] for stamp in stamps] if all(stamp in self.made for stamp in stamps) else None


@dataclass(frozen=True, slots=True)
class Scored:
    """Probabilities of class 1 by each classifier of a panel.

    Attributes:
        own: Of the examples, shape (n, classifiers); NaN of those that are bad.
        altered: Of the rows of each check, shape (rows, classifiers); NaN where its pictures cannot be opened or are
            the row's own.
    """

    own: Probabilities
    altered: dict[str, Probabilities]


@dataclass(frozen=True, slots=True)
class Scorer:
    """What scores rows: a classifier, or a panel.

    Attributes:
        backbone: Turns rows into features.
        taps: Where these are read.
        columns: How many classifiers there are.
        probabilities_of: Returns their probabilities of class 1, shape (n, columns), from features at the taps.
    """

    backbone: Backbone
    taps: Sequence[Tap]
    columns: int
    probabilities_of: Callable[[Features], Probabilities]

    @classmethod
    def of(cls, one: Classifier | Panel) -> Scorer:
        """Return what scores as a classifier or panel does, to the last bit."""
        if isinstance(one, Panel):
            return cls(one.backbone, one.taps, len(one.classifiers), one.probabilities_of)
        return cls(one.backbone, [one.tap], 1, lambda features: one.probabilities_of(features[:, 0])[:, 1:])


def score_once(
    scorer: Scorer,
    examples: Sequence[Example],
    planned: Mapping[str, Altered | str],
    bad: BadRows,
    *,
    thumbnails: ThumbnailKeeper,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> Scored:
    """Score examples, together with the altered copies that checks need.

    Probabilities of the examples are those that `predict_proba` gives, to the last bit: altered rows are in batches of
    their own.

    Args:
        scorer: What scores.
        examples: What to score.
        planned: The checks, as `plan_checks` gave them.
        bad: Those in it are passed over; given the examples whose pictures cannot be opened.
        thumbnails: Shown every picture.
        store: Where features are kept, those of altered rows too.
        progress: Show a progress bar.
    """
    backbone, taps, width = scorer.backbone, scorer.taps, scorer.columns
    own_reader, reader = (FeatureReader(backbone, taps, store, recall_bytes=np.inf) for _ in range(2))
    features = np.empty((len(examples), len(taps), backbone.hidden_size), dtype=np.float32)
    scored = Scored(
        np.full((len(examples), width), np.nan),
        {name: np.full((len(a.rows), width), np.nan) for name, a in planned.items() if not isinstance(a, str)},
    )
    beside, apart = _assigned(examples, planned, bad)
    own_pictures: dict[int, bytes] = {}
    pictures: dict[tuple[str, int], bytes] = {}
    read = partial(backbone.processor.read_pictures, observe=thumbnails.observe)
    for window in windows(
        backbone.processor, examples, bad, group=True, read=read, progress=progress, title="score rows"
    ):
        own_reader.fill(features, window)
        slots = []
        rows = []
        for position, item in zip(window.positions, window.prepared, strict=True):
            own_pictures[position] = item.pictures.key
            for slot, text in beside.get(position, ()):
                with suppress(DataError):  # the text of a row that cannot be used
                    rows.append(backbone.processor.encode(replace(examples[position], text=text), item.pictures))
                    slots.append(slot)
                    pictures[slot] = item.pictures.key
        if rows:
            _keep(scored, slots, _probabilities(scorer, reader.read(rows, [None] * len(rows))))
    good = [position for position in range(len(examples)) if position not in bad]
    # All at once, as `predict_proba` does: a matrix product of other shape may round otherwise.
    scored.own[good] = _probabilities(scorer, features[good] if len(bad) else features)
    others = [example for _, example in apart]
    for window in windows(
        backbone.processor, others, BadRows(), group=True, progress=progress, title="score changed rows"
    ):
        found = _probabilities(scorer, reader.read(window.prepared, window.ids))
        _keep(scored, [apart[position][0] for position in window.positions], found)
    for name, number in pictures:
        altered = planned[name]
        assert not isinstance(altered, str)
        row = int(altered.rows[number])
        if name == "images_permuted" and own_pictures.get(row) == pictures[name, number]:
            scored.altered[name][number] = np.nan
    return scored


def _assigned(
    examples: Sequence[Example], planned: Mapping[str, Altered | str], bad: BadRows
) -> tuple[dict[int, list[tuple[tuple[str, int], str]]], list[tuple[tuple[str, int], Example]]]:
    """Find for each altered row the first example of the same pictures, and those that have none."""
    firsts: dict[tuple[bytes, ...], int] = {}
    for position, example in enumerate(examples):
        if position not in bad:
            firsts.setdefault(tuple(stamp_of(source) for source in example.images), position)
    beside: dict[int, list[tuple[tuple[str, int], str]]] = {}
    apart: list[tuple[tuple[str, int], Example]] = []
    for name, altered in planned.items():
        for number, example in enumerate(() if isinstance(altered, str) else altered.examples):
            first = firsts.get(tuple(stamp_of(source) for source in example.images))
            if first is None:
                apart.append(((name, number), example))
            else:
                beside.setdefault(first, []).append(((name, number), example.text))
    return beside, apart


def _probabilities(scorer: Scorer, features: Features) -> Probabilities:
    return check_numbers(scorer.probabilities_of(features))


def _keep(scored: Scored, slots: Sequence[tuple[str, int]], found: Probabilities) -> None:
    for (name, number), probability in zip(slots, found, strict=True):
        scored.altered[name][number] = probability
