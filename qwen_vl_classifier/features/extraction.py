"""Examples -> features, reading from a store what it has and keeping what is new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.features.store import FeatureStore, Key, feature_key


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
        float32, shape (examples, taps, hidden).

    Raises:
        ConfigError: A tap that the backbone does not have.
        ImageError: A picture cannot be opened.
        FeatureStoreError: Features cannot be written.
    """
    taps = backbone.check_taps(taps)
    total = len(examples) if isinstance(examples, Sequence) else None
    windows = []
    with tqdm(total=total, desc="encode", unit="row", delay=2, disable=not progress) as bar:
        for prepared in backbone.prepare_windows(examples):
            if store is None:
                features = backbone.encode_prepared(prepared, taps)
            else:
                features = np.empty((len(prepared), len(taps), backbone.hidden_size), dtype=np.float32)
                keys = [[feature_key(backbone.fingerprint, tap, item) for tap in taps] for item in prepared]
                missing: dict[Key, list[int]] = {}  # rows of the same content by their first key
                for row, row_keys in enumerate(keys):
                    kept = [store.get(key) for key in row_keys]
                    if any(feature is None for feature in kept):
                        missing.setdefault(row_keys[0], []).append(row)
                    else:
                        features[row] = kept
                if missing:
                    firsts = [rows[0] for rows in missing.values()]
                    encoded = backbone.encode_prepared([prepared[row] for row in firsts], taps)
                    for rows, feature in zip(missing.values(), encoded, strict=True):
                        features[rows] = feature
                    store.put(
                        {
                            key: (tap, features[row, number])
                            for row in firsts
                            for number, (tap, key) in enumerate(zip(taps, keys[row], strict=True))
                            if key not in store
                        }
                    )
            windows.append(features)
            bar.update(len(prepared))
    if not windows:
        return np.zeros((0, len(taps), backbone.hidden_size), dtype=np.float32)
    return np.concatenate(windows)
