"""Examples -> features, reading from a store what it has and keeping what is new."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import LAST_NORM, POOLINGS, Tap
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.features.index import KEY_BYTES
from qwen_vl_classifier.features.shards import Origin, clear_leftovers
from qwen_vl_classifier.features.store import FeatureStore, Key, feature_keys


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run of `keep_features` did.

    Attributes:
        rows: Examples that there were.
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
    examples: Iterable[Example],
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    store: FeatureStore | None = None,
    progress: bool = True,
) -> npt.NDArray[np.float32]:
    """Read features of examples at taps, each at most once in a store's life.

    Args:
        examples: What to encode; read lazily, a few hundred at a time.
        backbone: What to encode with.
        taps: Where to read; all of them come from one pass.
        store: Where features are kept; `None` keeps nothing.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        float32, shape (examples, taps, hidden); from a float16 store, rounded as it keeps them. Where they would not
        fit in memory, `stream_features` gives them piece by piece.

    Raises:
        ConfigError: A tap that the backbone does not have.
        ImageError: A picture cannot be opened.
        FeatureStoreError: Features cannot be written.
    """
    windows = stream_features(examples, backbone, taps, store=store, progress=progress)
    if not isinstance(examples, Sequence):
        return np.concatenate([np.zeros((0, len(taps), backbone.hidden_size), dtype=np.float32), *windows])
    features = np.empty((len(examples), len(taps), backbone.hidden_size), dtype=np.float32)
    done = 0
    for window in windows:
        features[done : done + len(window)] = window
        done += len(window)
    return features


def stream_features(
    examples: Iterable[Example],
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    store: FeatureStore | None = None,
    progress: bool = True,
) -> Iterator[npt.NDArray[np.float32]]:
    """Read features as `extract_features` does, and give them in pieces, so that memory does not grow with the data.

    Returns:
        float32 arrays of shape (a few hundred, taps, hidden), in the order of the examples.
    """
    taps = backbone.check_taps(taps)
    windows = _windows(examples, backbone, progress)
    return (features_of(window.prepared, window.ids, backbone, taps, store=store) for window in windows)


def features_of(
    prepared: Sequence[EncodedExample],
    ids: Sequence[str | None],
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    store: FeatureStore | None = None,
    token_budget: int | None = None,
) -> npt.NDArray[np.float32]:
    """Read features of examples that the backbone prepared, in one go.

    Args:
        prepared: The examples; a few hundred at most.
        ids: Their ids, which the store keeps for whoever reads its files.
        backbone: What to encode with.
        taps: Where to read.
        store: Where features are kept; `None` keeps nothing.
        token_budget: As in `Backbone.encode`.

    Returns:
        float32, shape (examples, taps, hidden).
    """
    if store is None:
        return backbone.encode_prepared(prepared, taps, token_budget=token_budget)
    features = np.empty((len(prepared), len(taps), backbone.hidden_size), dtype=np.float32)
    _complete(_Window(prepared, ids), backbone, taps, store, into=features, token_budget=token_budget)
    return features


def keep_features(
    examples: Iterable[Example],
    backbone: Backbone,
    taps: Sequence[Tap],
    store: FeatureStore,
    *,
    progress: bool = True,
) -> Extraction:
    """Put the features of examples into a store, without holding them; what it has is checked, not read.

    Args and errors are those of `extract_features`.
    """
    taps = backbone.check_taps(taps)
    rows = encoded = 0
    before = store.written
    for window in _windows(examples, backbone, progress):
        rows += len(window.prepared)
        encoded += _complete(window, backbone, taps, store)
    clear_leftovers(store.folder)  # of processes that wrote to it too, and were killed meanwhile
    return Extraction(rows, encoded, store.written - before)


@dataclass(frozen=True, slots=True)
class _Window:
    """Examples that are encoded together, and their ids."""

    prepared: Sequence[EncodedExample]
    ids: Sequence[str | None]


def _windows(examples: Iterable[Example], backbone: Backbone, progress: bool) -> Iterator[_Window]:
    total = len(examples) if isinstance(examples, Sequence) else None
    ids: deque[str | None] = deque()  # of those read and not yet prepared; they may be read in another thread

    def noted() -> Iterator[Example]:
        for example in examples:
            ids.append(example.id)
            yield example

    with tqdm(total=total, desc="encode", unit="row", delay=2, disable=not progress) as bar:
        for prepared in backbone.prepare_windows(noted()):
            yield _Window(prepared, [ids.popleft() for _ in prepared])
            bar.update(len(prepared))


def _complete(
    window: _Window,
    backbone: Backbone,
    taps: Sequence[Tap],
    store: FeatureStore,
    *,
    into: npt.NDArray[np.float32] | None = None,
    token_budget: int | None = None,
) -> int:
    """Encode what a store lacks of a window, keep it, and return how many examples that took.

    Args:
        window: The examples.
        backbone: What to encode with.
        taps: Where to read.
        store: Where features are kept.
        into: Shape (examples, taps, hidden); all features are written here. `None` only keeps them.
        token_budget: As in `Backbone.encode`.
    """
    keys = feature_keys(backbone.fingerprint, taps, window.prepared)

    def look() -> npt.NDArray[np.bool_]:
        flat = keys.reshape(-1, KEY_BYTES)
        found = store.holds(flat) if into is None else store.read(flat, into.reshape(len(flat), -1))
        return found.reshape(keys.shape[:2])

    found = look()
    if not found.all():
        store.refresh()  # another process may have kept it meanwhile
        found = look()
    same: dict[bytes, list[int]] = {}  # rows of the same content
    for row in np.flatnonzero(~found.all(axis=1)):
        same.setdefault(keys[row].tobytes(), []).append(int(row))
    if not same:
        return 0
    firsts = [rows[0] for rows in same.values()]
    columns = np.flatnonzero(
        ~found[firsts].all(axis=0)
    ).tolist()  # the pass goes no deeper than the taps that are missing
    encoded = backbone.encode_prepared(
        [window.prepared[row] for row in firsts], [taps[column] for column in columns], token_budget=token_budget
    )
    fresh: dict[Key, tuple[Tap, npt.NDArray[np.float32]]] = {}
    ids: dict[Key, str | None] = {}
    for rows, features in zip(same.values(), store.as_kept(encoded), strict=True):
        for column, feature in zip(columns, features, strict=True):
            if not found[rows[0], column]:
                key = keys[rows[0], column].tobytes()
                fresh[key] = (taps[column], feature)
                ids[key] = window.ids[rows[0]]
                if into is not None:
                    into[rows, column] = feature
    store.put(fresh, origin=Origin(backbone.name, backbone.fingerprint), ids=ids)
    return len(firsts)
