"""Examples -> features, reading from a store what it has and keeping what is new."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.stream import RECALL_BYTES, FeatureReader, Features, read_all, windows
from qwen_vl_classifier.backbone.taps import LAST_NORM, POOLINGS, Tap
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples, each_example
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.features.feature_files import Origin
from qwen_vl_classifier.features.index import KEY_BYTES
from qwen_vl_classifier.features.store import FeatureStore, Key, feature_keys
from qwen_vl_classifier.files.whole import clear_leftovers


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run of `keep_features` did.

    Attributes:
        rows: Examples whose features are in the store now.
        encoded: Those among them that went through the backbone: of the same content, one.
        features: Features that were put into the store.
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
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    store: FeatureStore | None = None,
    progress: bool = True,
    bad: BadRows | None = None,
) -> Features:
    """Read features of examples at taps, each at most once in a store's life.

    The same example given twice has the same features to the last bit. Of a sequence, each picture is opened once.

    Args:
        examples: What to encode, anything that `load_examples` takes; of an iterator, read a few hundred at a time.
        backbone: What to encode with.
        taps: Where to read; all of them come from one pass.
        store: Where features are kept; `None` keeps nothing.
        progress: Show a progress bar if it takes more than two seconds.
        bad: Given the examples whose pictures cannot be opened. These are left out, and so are those in it already,
            which are not looked at. Without it they are an error.

    Returns:
        float32, shape (examples, taps, hidden), without those that are bad; from a float16 store, rounded as it keeps
        them. Where they would not fit in memory, `stream_features` gives them piece by piece.

    Raises:
        ConfigError: A tap that the backbone does not have.
        DataError: Rows that cannot be used, such as one without text.
        ImageError: Pictures cannot be opened; the message lists the rows. Of a sequence, all headers are read first.
            What only decoding shows is an error at the end, when all other features are in the store.
        FeatureStoreError: Features cannot be written.
    """
    reader = feature_reader(backbone, taps, store, recall_bytes=math.inf)
    given = each_example(examples) if isinstance(examples, Iterator) else as_examples(examples, read_labels=False)
    found = _checked(given) if bad is None else bad
    features = read_all(reader, given, found, progress=progress)
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
    """Read features as `extract_features` does, and give them in pieces, so that memory does not grow with the data.

    Without a store, an example that comes again has the same features to the last bit unless 256 MB of features of
    other examples came in between: so much is remembered. With a store it always has.

    Returns:
        float32 arrays of shape (a few hundred, taps, hidden), in the order of the examples. What cannot be opened is
        an error at the end, as in `extract_features`.
    """
    reader = feature_reader(backbone, taps, store)

    def pieces() -> Iterator[Features]:
        bad, rows = BadRows(), 0
        for window in windows(backbone.processor, examples, bad, progress=progress):
            rows += len(window.prepared)
            yield reader.read(window.prepared, window.ids)
        bad.check(rows + len(bad))

    return pieces()


def keep_features(
    examples: Iterable[Example],
    backbone: Backbone,
    taps: Sequence[Tap],
    store: FeatureStore,
    *,
    progress: bool = True,
    bad: BadRows | None = None,
) -> Extraction:
    """Put the features of examples into a store, without holding them; what it has is checked, not read.

    Args and errors are those of `extract_features`.
    """
    reader = feature_reader(backbone, taps, store)
    found = _checked(examples) if bad is None else bad
    rows = encoded = 0
    before = store.written
    for window in windows(backbone.processor, examples, found, group=True, progress=progress):
        rows += len(window.prepared)
        encoded += reader.keep(window.prepared, window.ids)
    clear_leftovers(store.folder)  # of processes that wrote to it too, and were killed meanwhile
    if bad is None:
        found.check(rows + len(found))
    return Extraction(rows, encoded, store.written - before)


def _checked(examples: Iterable[Example]) -> BadRows:
    """Read all headers before anything is computed, where the examples are there to be looked at twice."""
    bad = BadRows()
    if isinstance(examples, Sequence):
        read_sizes(examples, bad)
        bad.check(len(examples))
    return bad


def feature_reader(
    backbone: Backbone,
    taps: Sequence[Tap],
    store: FeatureStore | None,
    *,
    token_budget: int | None = None,
    recall_bytes: float = RECALL_BYTES,
) -> FeatureReader:
    """Return what reads features of windows, through a store where there is one; see `FeatureReader`.

    Raises:
        ConfigError: A tap that the backbone does not have.
    """
    keeper = None if store is None else StoreKeeper(store, backbone)
    return FeatureReader(backbone, taps, keeper=keeper, token_budget=token_budget, recall_bytes=recall_bytes)


@dataclass(frozen=True, slots=True)
class StoreKeeper:
    """Holds features of a stream in a store.

    Attributes:
        store: Where they are kept.
        backbone: What encodes them; its fingerprint is part of their names.
    """

    store: FeatureStore
    backbone: Backbone

    def find(
        self, prepared: Sequence[EncodedExample], taps: Sequence[Tap], into: Features | None
    ) -> npt.NDArray[np.bool_]:
        """Tell which features are kept, shape (examples, taps), and write those into `into` unless it is `None`."""
        keys = feature_keys(self.backbone.fingerprint, taps, prepared)
        flat = keys.reshape(-1, KEY_BYTES)

        def look() -> npt.NDArray[np.bool_]:
            found = self.store.holds(flat) if into is None else self.store.read(flat, into.reshape(len(flat), -1))
            return found.reshape(keys.shape[:2])

        found = look()
        if not found.all():
            self.store.refresh()  # another process may have kept it meanwhile
            found = look()
        return found

    def keep(
        self,
        prepared: Sequence[EncodedExample],
        ids: Sequence[str | None],
        taps: Sequence[Tap],
        features: Features,
        new: npt.NDArray[np.bool_],
    ) -> Features:
        """Keep the features that are new, and return all as they come back from the store."""
        keys = feature_keys(self.backbone.fingerprint, taps, prepared)
        kept = self.store.as_kept(features)
        fresh: dict[Key, tuple[Tap, npt.NDArray[np.float32]]] = {}
        names: dict[Key, str | None] = {}
        for row, column in np.argwhere(new).tolist():
            key = keys[row, column].tobytes()
            fresh[key] = (taps[column], kept[row, column])
            names[key] = ids[row]
        self.store.put(fresh, origin=Origin(self.backbone.name, self.backbone.fingerprint), ids=names)
        return kept
