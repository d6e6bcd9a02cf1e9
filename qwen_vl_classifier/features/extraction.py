"""Extract features of examples: read from a store what it has, and store what is new."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from qwen_vl_classifier.backbone.backbone import Backbone, as_backbone
from qwen_vl_classifier.backbone.taps import LAST_NORM, POOLINGS, Tap
from qwen_vl_classifier.backbone.windows import windows
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples, each_example
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.features.reader import FeatureReader, Features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.whole import clear_leftovers


@dataclass(frozen=True, slots=True)
class Extraction:
    """The result of `keep_features`.

    Attributes:
        rows: Examples whose features are in the store now.
        encoded: Distinct examples that went through the backbone.
        features: Features that were added to the store.
    """

    rows: int
    encoded: int
    features: int


def every_tap(backbone: Backbone) -> list[Tap]:
    """Return all taps of a backbone: every pooling of every layer, and of the last one after the final norm."""
    layers = [*range(1, backbone.num_layers + 1)]
    if backbone.num_layers == backbone.total_layers:
        layers.append(LAST_NORM)
    return [Tap(layer, pooling) for layer in layers for pooling in POOLINGS]


def extract_features(
    examples: Source,
    backbone: Backbone | str | os.PathLike[str],
    taps: Sequence[Tap],
    *,
    store: FeatureStore | None = None,
    progress: bool = True,
    bad: BadRows | None = None,
) -> Features:
    """Read features of examples at taps; a store keeps them, so that no example is encoded twice.

    The same example given twice has the same features to the last bit. Of a sequence, each picture is opened once.

    Args:
        examples: Anything that `load_examples` takes; an iterator is read a few hundred examples at a time.
        backbone: The backbone that encodes, or its name, as `Backbone.load` takes it.
        taps: Where to read; all of them come from one pass.
        store: Where features are kept; `None` keeps nothing.
        progress: Show a progress bar if it takes more than two seconds.
        bad: Receives the examples that cannot be used, which are left out of the result. Examples that are in it
            already are skipped. Without it they are an error.

    Returns:
        float32, shape (examples, taps, hidden), without bad examples; rounded if the store keeps float16. If they
        would not fit in memory, use `stream_features`.

    Raises:
        ConfigError: A tap that the backbone does not have.
        DataError: Rows that cannot be used, such as one without text.
        ImageError: Pictures cannot be opened; the message lists the rows. Of a sequence, all headers are read first.
            What only decoding shows is an error at the end, when all other features are in the store.
        FeatureStoreError: Features cannot be written.
    """
    backbone = as_backbone(backbone)
    reader = FeatureReader(backbone, taps, store, recall_bytes=math.inf)
    given = each_example(examples) if isinstance(examples, Iterator) else as_examples(examples, read_labels=False)
    found = _checked(given) if bad is None else bad
    shape = len(reader.taps), backbone.hidden_size
    stream = windows(backbone.processor, given, found, group=True, progress=progress)
    if isinstance(given, Sequence):
        features = np.empty((len(given), *shape), dtype=np.float32)
        for window in stream:
            reader.fill(features, window)
        features = _without(features, {row.position for row in found})
    else:
        pieces = (reader.read(window.prepared, window.ids) for window in stream)
        features = np.concatenate([np.zeros((0, *shape), np.float32), *pieces])
    if bad is None:
        found.check(len(features) + len(found))
    return features


def stream_features(
    examples: Iterable[Example],
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    store: FeatureStore | None = None,
    progress: bool = True,
) -> Iterator[Features]:
    """Read features as `extract_features` does, window by window, so that memory does not grow with the data.

    An example that comes again has the same features to the last bit; without a store, only if less than 256 MB of
    features of other examples came in between.

    Returns:
        float32 arrays of shape (a few hundred, taps, hidden), in the order of the examples. Pictures that cannot be
        opened are an error at the end, as in `extract_features`.
    """
    reader = FeatureReader(backbone, taps, store)

    def read() -> Iterator[Features]:
        bad, rows = BadRows(), 0
        for window in windows(backbone.processor, examples, bad, progress=progress):
            rows += len(window.prepared)
            yield reader.read(window.prepared, window.ids)
        bad.check(rows + len(bad))

    return read()


def keep_features(
    examples: Iterable[Example],
    backbone: Backbone,
    taps: Sequence[Tap],
    store: FeatureStore,
    *,
    progress: bool = True,
    bad: BadRows | None = None,
) -> Extraction:
    """Store the features of examples without holding them in memory; those already stored are only checked.

    Arguments and errors are those of `extract_features`.
    """
    reader = FeatureReader(backbone, taps, store)
    found = _checked(examples) if bad is None else bad
    rows = encoded = 0
    before = store.written
    read = partial(backbone.processor.read_pictures, identify=False)  # nobody compares pictures
    for window in windows(backbone.processor, examples, found, group=True, read=read, progress=progress):
        rows += len(window.prepared)
        encoded += reader.keep(window.prepared, window.ids)
    clear_leftovers(store.folder)  # of other processes that wrote to it and were killed meanwhile
    if bad is None:
        found.check(rows + len(found))
    store.confirm()
    return Extraction(rows, encoded, store.written - before)


def _checked(examples: Iterable[Example]) -> BadRows:
    """Read the headers of all pictures before anything is computed; an iterator can be read only once, and is not."""
    bad = BadRows()
    if isinstance(examples, Sequence):
        read_sizes(examples, bad)
        bad.check(len(examples))
    return bad


def _without(features: Features, rows: set[int]) -> Features:
    """Remove rows in place: features may fill much of the memory."""
    kept = [row for row in range(len(features)) if row not in rows] if rows else []
    for target, row in enumerate(kept):
        if target != row:
            features[target] = features[row]
    return features[: len(features) - len(rows)]
