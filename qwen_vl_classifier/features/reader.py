"""Read features of windows of examples; the same example gets the same features to the last bit.

Extraction, evaluation and scoring read features through here, with and without a store. The last bits of a forward
pass depend on what else is in the batch. So an example is encoded once, and gets the same features wherever it comes
again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.backbone.windows import Window
from qwen_vl_classifier.features.feature_files import Origin
from qwen_vl_classifier.features.index import KEY_BYTES
from qwen_vl_classifier.features.store import FeatureStore, Key, feature_keys

Features: TypeAlias = npt.NDArray[np.float32]

RECALL_BYTES = 256_000_000
"""Bytes of features that a reader without a store remembers."""


class FeatureReader:
    """Read features of prepared examples, window by window.

    With a store, features are read from it and new ones are written to it. Without one, an example that comes again
    gets the features that it had before, until `recall_bytes` of other features have been read in between.

    Args:
        backbone: The backbone that encodes.
        taps: Where to read.
        store: Where features are kept, if anywhere.
        token_budget: As in `Backbone.encode`.
        recall_bytes: Bytes of features that are remembered without a store.

    Raises:
        ConfigError: The backbone does not have one of the taps.
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[Tap],
        store: FeatureStore | None = None,
        *,
        token_budget: int | None = None,
        recall_bytes: float = RECALL_BYTES,
    ) -> None:
        self.backbone = backbone
        self.taps = backbone.check_taps(taps)
        self._store = store
        self._token_budget = token_budget
        self._recall_bytes = recall_bytes
        self._known: dict[bytes, Features] = {}  # without a store: features by the key of their example
        self._recent: deque[list[tuple[bytes, Features]]] = deque()  # the same, window by window
        self._held = 0  # bytes

    def read(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None]) -> Features:
        """Return the features of a window, shape (examples, taps, hidden).

        Args:
            prepared: The examples.
            ids: Their ids, which the store records.
        """
        features = self._look_up(prepared, ids)
        self._remember(prepared, features)
        while self._held > self._recall_bytes and len(self._recent) > 1:
            for key, feature in self._recent.popleft():
                self._held -= feature.nbytes
                if self._known.get(key) is feature:  # else the example came again since
                    del self._known[key]
        return features

    def fill(self, features: Features, window: Window) -> None:
        """Write the features of a window into an array with a row for each example of the stream.

        Rows of the array serve as the reader's memory: none of them is copied or forgotten.

        Args:
            features: Shape (examples of the stream, taps, hidden).
            window: The window; its positions are rows of the array.
        """
        features[window.positions] = self._look_up(window.prepared, window.ids)
        self._remember(window.prepared, (features[position] for position in window.positions))

    def keep(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None]) -> int:
        """Put the features of a window that the store lacks into it; return how many examples had to be encoded."""
        return self._complete(prepared, ids, None)

    def _look_up(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None]) -> Features:
        features = np.empty((len(prepared), len(self.taps), self.backbone.hidden_size), dtype=np.float32)
        self._complete(prepared, ids, features)
        return features

    def _remember(self, prepared: Sequence[EncodedExample], features: Iterable[Features]) -> None:
        if self._store is None:
            window = [(item.key, feature) for item, feature in zip(prepared, features, strict=True)]
            self._known |= window
            self._recent.append(window)
            self._held += sum(feature.nbytes for _, feature in window)

    def _complete(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None], into: Features | None) -> int:
        """Encode the examples of a window with missing features; return how many there were."""
        found = self._recall(prepared, into) if self._store is None else self._find(self._store, prepared, into)
        same: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(~found.all(axis=1)).tolist():
            same.setdefault(prepared[row].key, []).append(row)
        if not same:
            return 0
        firsts = np.array([rows[0] for rows in same.values()])
        chosen = [prepared[row] for row in firsts]
        # The pass goes no deeper than the taps that are missing.
        columns = np.flatnonzero(~found[firsts].all(axis=0))
        taps = [self.taps[column] for column in columns.tolist()]
        encoded = self.backbone.encode_prepared(chosen, taps, token_budget=self._token_budget)
        # What is not a number is given to the caller, and not kept: with another dtype or device it may be one.
        new = ~found[np.ix_(firsts, columns)]
        if self._store is not None:
            kept = new & np.isfinite(encoded).all(axis=2)
            encoded = self._put(self._store, chosen, [ids[row] for row in firsts], taps, encoded, kept)
        if into is not None:
            for rows, features, missing in zip(same.values(), encoded, new, strict=True):
                into[np.ix_(np.array(rows), columns[missing])] = features[missing]
        return len(firsts)

    def _recall(self, prepared: Sequence[EncodedExample], into: Features | None) -> npt.NDArray[np.bool_]:
        """Write the features that are remembered; tell which they are, shape (examples, taps)."""
        found = np.zeros((len(prepared), len(self.taps)), dtype=bool)
        if into is not None:
            for row, item in enumerate(prepared):
                feature = self._known.get(item.key)
                if feature is not None:
                    into[row], found[row] = feature, True
        return found

    def _find(
        self, store: FeatureStore, prepared: Sequence[EncodedExample], into: Features | None
    ) -> npt.NDArray[np.bool_]:
        """Write the features that are in the store; tell which they are, shape (examples, taps)."""
        keys = feature_keys(self.backbone.fingerprint, self.taps, prepared).reshape(-1, KEY_BYTES)

        def look() -> npt.NDArray[np.bool_]:
            return store.holds(keys) if into is None else store.read(keys, into.reshape(len(keys), -1))

        found = look()
        if not found.all():
            store.refresh()  # another process may have written them meanwhile
            found = look()
        return found.reshape(len(prepared), len(self.taps))

    def _put(
        self,
        store: FeatureStore,
        prepared: Sequence[EncodedExample],
        ids: Sequence[str | None],
        taps: Sequence[Tap],
        features: Features,
        new: npt.NDArray[np.bool_],
    ) -> Features:
        """Put the features that are new into the store, and return all features as the store returns them."""
        keys = feature_keys(self.backbone.fingerprint, taps, prepared)
        kept = store.as_kept(features)
        fresh: dict[Key, tuple[Tap, Features]] = {}
        names: dict[Key, str | None] = {}
        for row, column in np.argwhere(new).tolist():
            key = keys[row, column].tobytes()
            fresh[key] = (taps[column], kept[row, column])
            names[key] = ids[row]
        store.put(fresh, origin=Origin(self.backbone.name, self.backbone.fingerprint), ids=names)
        return kept
