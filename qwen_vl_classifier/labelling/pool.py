"""The rows that can be asked: their features in a temporary file, their keys, and which of them are the same."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.backbone.windows import windows
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import margins_of
from qwen_vl_classifier.data.bad_rows import BadRows, Examples
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.features.reader import FeatureReader
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.room import check_room
from qwen_vl_classifier.images.identity import picture_identities
from qwen_vl_classifier.training.overlap import row_hashes
from qwen_vl_classifier.training.probe.candidates import candidate_taps
from qwen_vl_classifier.training.splitting import RowNumbers, groups_of

_MOVED_BYTES = 64 << 20  # of features that are copied at a time


@dataclass(slots=True)
class Pool:
    """The rows that can be asked, each content once. Use `encode`.

    Attributes:
        examples: One for each content; a question is about one of these.
        keys: Of each, 16 hexadecimal digits that depend on its text and pixels alone, not on names or order.
        groups: Of each, shape (n,): rows of one number share a picture, or what `group_by` says.
        features: float32, shape (n, taps, hidden); the features of each tap are contiguous.
        taps: Where they were read.
        everything: All rows of the data that can be used, in order; rows of the same content are among them.
        numbers: Of each of these, its number among `examples`.
        indices: Of each of these, its index among the examples that were given.
        positions: Of each of these, its position among all rows of the data, from 0.
        left_out: The rows that cannot be used, as `BadRows.to_json` describes them.
        backbone: What the backbone is called.
    """

    examples: list[Example]
    keys: list[str]
    groups: RowNumbers
    features: npt.NDArray[np.float32]
    taps: tuple[Tap, ...]
    everything: list[Example]
    numbers: RowNumbers
    indices: RowNumbers
    positions: RowNumbers
    left_out: dict[str, Any]
    backbone: str
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rows = {key: row for row, key in enumerate(self.keys)}

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def encode(
        cls,
        examples: Sequence[Example],
        backbone: Backbone,
        *,
        store: FeatureStore | None = None,
        taps: Sequence[Tap] | None = None,
        keep_taps: Sequence[Tap] = (),
        max_errors: str | int = "100%",
        group_by: str = "image",
        scratch: Path | None = None,
        progress: bool = True,
    ) -> Pool:
        """Read the features of all rows once.

        With a store, what was read stays: the next time nothing is computed again, and a run that was killed goes on.
        In memory there is one window of features at a time. All features lie in a file without a name, which the
        system removes when the process ends, in whatever way.

        Args:
            examples: The rows, with or without labels.
            backbone: What reads them.
            store: Where features are kept, if anywhere.
            taps: Where to read; `None` reads all that `train` tries by default, so that training needs no further pass.
            keep_taps: Further taps.
            max_errors: How many rows with pictures that cannot be opened, or texts that are too long, are left out.
            group_by: What rows of one group share, as in `groups_of`.
            scratch: Folder of the temporary file; `None` for that of the store, or the system's own.
            progress: Show progress bars on what takes more than two seconds.

        Raises:
            DataError: More rows cannot be used, or all of them; they are listed.
            ConfigError: The backbone does not have a tap, or there is no room for the features.
        """
        read = list(dict.fromkeys([*(candidate_taps("auto", backbone) if taps is None else taps), *keep_taps]))
        bad = BadRows(max_errors, what="rows", can_leave_out=True, given=examples)
        read_sizes(examples, bad, progress=progress)
        bad.check(len(examples))
        folder = scratch or (store.folder if store is not None else Path(tempfile.gettempdir()))
        shape = len(read), len(examples), backbone.hidden_size
        check_room([(folder, int(np.prod(shape)) * 4)], "features of all rows")
        with tempfile.TemporaryFile(dir=folder) as file:  # which has no name, and lasts as long as it is mapped
            features = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        by_row = features.transpose(1, 0, 2)
        reader = FeatureReader(backbone, read, store)
        for window in windows(backbone.processor, examples, bad, group=True, progress=progress):
            by_row[window.positions] = reader.read(window.prepared, window.ids)
        bad.check(len(examples))
        used = np.array([row for row in range(len(examples)) if row not in bad], dtype=np.int64)
        everything = list(bad.without(examples))
        pictures = picture_identities([example.images for example in everything])
        hashes = row_hashes(everything, pictures)
        first: dict[str, int] = {}
        numbers = np.array([first.setdefault(key, len(first)) for key in hashes], dtype=np.int64)
        _, firsts = np.unique(numbers, return_index=True)  # numbers rise with their first rows
        _keep(features, used[firsts])
        chosen = [everything[row] for row in firsts]
        return cls(
            examples=chosen,
            keys=list(first),
            groups=groups_of(chosen, group_by, pictures=[pictures[row] for row in firsts]),
            features=by_row[: len(chosen)],
            taps=tuple(read),
            everything=everything,
            numbers=numbers,
            indices=used,
            positions=_positions(examples)[used],
            left_out=bad.to_json(len(examples)),
            backbone=backbone.name,
        )

    def row_of(self, key: str) -> int | None:
        """Return the number of a row by its key, or `None` if there is no such row."""
        return self._rows.get(key)

    def order(self, seed: int) -> RowNumbers:
        """Return all rows in a random order, shape (n,).

        The order of two rows depends on their content and the seed, not on which other rows there are: data that is
        reordered or grows keeps it.
        """
        drawn = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in self.keys]
        return np.array(sorted(range(len(drawn)), key=drawn.__getitem__), dtype=np.int64)

    def margins_by(self, classifier: Classifier) -> npt.NDArray[np.float64]:
        """Return the log odds of class 1 of all rows by a classifier whose tap was read, shape (n,).

        Raises:
            ConfigError: Its tap was not read.
        """
        if classifier.tap not in self.taps:
            raise ConfigError(f"tap {classifier.tap} of the classifier was not read; expected it among the taps")
        features = self.features[:, self.taps.index(classifier.tap)]
        step = max(1, _MOVED_BYTES // (4 * features.shape[1]))
        parts = [classifier.logits_of(features[start : start + step]) for start in range(0, len(self), step)]
        return margins_of(np.concatenate(parts)).astype(np.float64)

    def close(self) -> None:
        """Let go of the features; their file is gone when nothing else has them."""
        self.features = np.zeros((0, *self.features.shape[1:]), dtype=np.float32)


def _keep(features: npt.NDArray[np.float32], rows: RowNumbers) -> None:
    """Move some rows to the front, in place and tap by tap.

    Args:
        features: Shape (taps, n, hidden).
        rows: Their numbers, rising.
    """
    step = max(1, _MOVED_BYTES // features[0, :1].nbytes)
    for tap in features:
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            if some[-1] != start + len(some) - 1:
                tap[start : start + len(some)] = tap[some]


def _positions(examples: Sequence[Example]) -> RowNumbers:
    """Return the position of each example among all rows of its data, shape (n,): some may not have become examples."""
    unread = {row.position for row in examples.unread} if isinstance(examples, Examples) else set()
    rows = (row for row in range(len(examples) + len(unread)) if row not in unread)
    return np.fromiter(rows, dtype=np.int64, count=len(examples))
