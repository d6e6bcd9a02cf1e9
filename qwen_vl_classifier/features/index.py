"""Find the file and row of a key in a few sorted arrays: millions of keys cost megabytes and no Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint8]
"""Keys as rows of bytes, shape (n, 32)."""

KEY_BYTES = 32

_MOST_IN_A_RUN = 1 << 20  # merging copies: a copy of all keys at once would double their memory


@dataclass(frozen=True, slots=True)
class _Run:
    """Entries in the order of `first`: the first 8 bytes of a key, the next 8, its file and its row there."""

    first: npt.NDArray[np.uint64]
    second: npt.NDArray[np.uint64]
    file: npt.NDArray[np.uint32]
    row: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.first)

    def take(self, which: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> _Run:
        return _Run(self.first[which], self.second[which], self.file[which], self.row[which])


class KeyIndex:
    """Find the file and the row of a key.

    An entry takes 24 bytes: 16 of the key's 32, the number of a file and a row. No two SHA-256 digests are known that
    agree in 16 bytes; even so, the store compares the whole key when it reads a feature.

    New entries form sorted runs, and small runs are merged into larger ones: adding to n entries costs O(log n)
    for each, and a search looks at few runs.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        """Count the distinct keys."""
        if not self._runs:
            return 0
        whole = _joined(self._runs)
        order = np.lexsort((whole.second, whole.first))
        first, second = whole.first[order], whole.second[order]
        return 1 + int(np.count_nonzero((first[1:] != first[:-1]) | (second[1:] != second[:-1])))

    def add(self, files: Iterable[tuple[int, Keys]]) -> None:
        """Add files: the number of each, and the keys of its rows in order."""
        new: list[_Run] = []
        entries = 0
        for number, keys in files:
            words = _words(keys)
            file = np.full(len(keys), number, dtype=np.uint32)
            new.append(_Run(words[:, 0], words[:, 1], file, np.arange(len(keys), dtype=np.uint32)))
            entries += len(keys)
            if entries >= _MOST_IN_A_RUN:
                self._push(new)
                new, entries = [], 0
        if new:
            self._push(new)

    def find(self, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Look keys up.

        Returns:
            For each key the number of a file that has it, or -1, and its row there.
        """
        words = _words(keys)
        files = np.full(len(keys), -1, dtype=np.int64)
        rows = np.zeros(len(keys), dtype=np.int64)
        for run in self._runs:
            left = np.flatnonzero(files < 0)
            entries = np.searchsorted(run.first, words[left, 0])
            while len(left):
                # Entries that agree in the first 8 bytes are neighbours, in no order.
                here = entries < len(run)
                here[here] = run.first[entries[here]] == words[left[here], 0]
                left, entries = left[here], entries[here]
                match = run.second[entries] == words[left, 1]
                files[left[match]] = run.file[entries[match]]
                rows[left[match]] = run.row[entries[match]]
                left, entries = left[~match], entries[~match] + 1
        return files, rows

    def discard(self, file: int) -> None:
        """Remove all entries of a file."""
        kept = (run.take(run.file != file) for run in self._runs)
        self._runs = [run for run in kept if len(run)]

    def _push(self, new: Sequence[_Run]) -> None:
        self._runs.append(_sorted(new))
        while len(self._runs) > 1:
            last, before = self._runs[-1], self._runs[-2]
            if len(before) > 2 * len(last) or len(before) + len(last) > _MOST_IN_A_RUN:
                break
            self._runs[-2:] = [_sorted((before, last))]


def _words(keys: Keys) -> npt.NDArray[np.uint64]:
    """View keys as words of 8 bytes; any order of them will do, as long as it is always the same."""
    return np.ascontiguousarray(keys, dtype=np.uint8).view(np.uint64).reshape(len(keys), KEY_BYTES // 8)


def _joined(runs: Sequence[_Run]) -> _Run:
    return _Run(
        np.concatenate([run.first for run in runs]),
        np.concatenate([run.second for run in runs]),
        np.concatenate([run.file for run in runs]),
        np.concatenate([run.row for run in runs]),
    )


def _sorted(runs: Sequence[_Run]) -> _Run:
    joined = _joined(runs)
    return joined.take(np.argsort(joined.first))
