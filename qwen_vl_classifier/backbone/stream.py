"""A stream of examples -> features, a window at a time; the same example gets the same features to the last bit.

Every way to features goes through here: `Backbone.encode`, extraction with and without a store, evaluation and scoring.
What a forward pass gives depends, in its last bits, on what else is in the batch. So an example is encoded once, and
given the same features wherever it comes again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qwen_vl_classifier.backbone.preparing import by_picture, prepare_outcomes, read_ahead
from qwen_vl_classifier.backbone.processor import EncodedExample, Observer, Processor
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ExampleError

Features: TypeAlias = npt.NDArray[np.float32]

RECALL_BYTES = 256_000_000
"""Features that a stream without a store remembers, in bytes."""


class Encoder(Protocol):
    """What a stream needs of a `Backbone`."""

    processor: Processor

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    def check_taps(self, taps: Sequence[Tap]) -> Sequence[Tap]:
        """Return the taps if all of them can be read."""

    def encode_prepared(
        self,
        prepared: Sequence[EncodedExample],
        taps: Sequence[Tap],
        *,
        token_budget: int | None = None,
        share_prefixes: bool = True,
    ) -> Features:
        """Return the features of examples, shape (examples, taps, hidden)."""


class Keeper(Protocol):
    """Holds features beyond one stream, such as a store on disk."""

    def find(
        self, prepared: Sequence[EncodedExample], taps: Sequence[Tap], into: Features | None
    ) -> npt.NDArray[np.bool_]:
        """Tell which features are held, shape (examples, taps), and write those into `into` unless it is `None`."""

    def keep(
        self,
        prepared: Sequence[EncodedExample],
        ids: Sequence[str | None],
        taps: Sequence[Tap],
        features: Features,
        new: npt.NDArray[np.bool_],
    ) -> Features:
        """Hold the features that are new, shape (examples, taps, hidden), and return all as they will be found."""


@dataclass(frozen=True, slots=True)
class Window:
    """Examples of a stream that are encoded together.

    Attributes:
        positions: Where each stood in the stream, from 0.
        ids: Their ids.
        prepared: What the model reads.
    """

    positions: list[int]
    ids: list[str | None]
    prepared: list[EncodedExample]


class FeatureReader:
    """Read features of prepared examples, window by window.

    Without a keeper, an example that comes again gets the features that it had, as long as it is remembered: until
    features of `recall_bytes` of other examples were read since it last came. With a keeper, that is the memory, and
    nothing is forgotten.

    Args:
        backbone: What to encode with.
        taps: Where to read.
        keeper: Where features are held, if anywhere.
        recall_bytes: Features that are remembered without a keeper; infinity where the caller holds all of them anyway.
        token_budget: As in `Backbone.encode`.
        share_prefixes: As in `Backbone.encode`.
    """

    def __init__(
        self,
        backbone: Encoder,
        taps: Sequence[Tap],
        *,
        keeper: Keeper | None = None,
        recall_bytes: float = RECALL_BYTES,
        token_budget: int | None = None,
        share_prefixes: bool = True,
    ) -> None:
        self.backbone = backbone
        self.taps = backbone.check_taps(taps)
        self._keeper = keeper
        self._recall_bytes = recall_bytes
        self._token_budget = token_budget
        self._share_prefixes = share_prefixes
        self._known: dict[bytes, Features] = {}
        self._recent: deque[list[tuple[bytes, Features]]] = deque()  # the same, window by window
        self._held = 0  # bytes

    def read(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None]) -> Features:
        """Return the features of a window, shape (examples, taps, hidden), and remember them.

        Args:
            prepared: The examples.
            ids: Their ids, for a keeper.
        """
        features = self.look_up(prepared, ids)
        self.remember(prepared, features)
        return features

    def look_up(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None]) -> Features:
        """Do what `read` does, but leave it to the caller what is remembered."""
        features = np.empty((len(prepared), len(self.taps), self.backbone.hidden_size), dtype=np.float32)
        self._complete(prepared, ids, features)
        return features

    def keep(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None]) -> int:
        """Give the keeper what it lacks of a window, and return how many examples had to be encoded for it."""
        return self._complete(prepared, ids, None)

    def remember(self, prepared: Sequence[EncodedExample], features: Iterable[Features]) -> None:
        """Hold on to the features of a window, and forget the oldest ones beyond the bound.

        Args:
            prepared: The examples.
            features: Those of each, shape (taps, hidden); they are not copied.
        """
        if self._keeper is not None:
            return
        window = [(item.key, feature) for item, feature in zip(prepared, features, strict=True)]
        self._known |= window
        self._recent.append(window)
        self._held += sum(feature.nbytes for _, feature in window)
        while self._held > self._recall_bytes and len(self._recent) > 1:
            for key, feature in self._recent.popleft():
                self._held -= feature.nbytes
                if self._known.get(key) is feature:  # else it came again since
                    del self._known[key]

    def _complete(self, prepared: Sequence[EncodedExample], ids: Sequence[str | None], into: Features | None) -> int:
        """Encode what is lacking of a window; return how many examples that took."""
        found = self._find(prepared, into)
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
        encoded = self.backbone.encode_prepared(
            chosen, taps, token_budget=self._token_budget, share_prefixes=self._share_prefixes
        )
        new = ~found[np.ix_(firsts, columns)]
        if self._keeper is not None:
            encoded = self._keeper.keep(chosen, [ids[row] for row in firsts], taps, encoded, new)
        if into is not None:
            for rows, features, lacking in zip(same.values(), encoded, new, strict=True):
                into[np.ix_(np.array(rows), columns[lacking])] = features[lacking]
        return len(firsts)

    def _find(self, prepared: Sequence[EncodedExample], into: Features | None) -> npt.NDArray[np.bool_]:
        if self._keeper is not None:
            return self._keeper.find(prepared, self.taps, into)
        found = np.zeros((len(prepared), len(self.taps)), dtype=bool)
        if into is not None:
            for row, item in enumerate(prepared):
                feature = self._known.get(item.key)
                if feature is not None:
                    into[row], found[row] = feature, True
        return found


def windows(
    processor: Processor,
    examples: Iterable[Example],
    bad: BadRows,
    *,
    group: bool = False,
    observe: Observer | None = None,
    progress: bool = False,
) -> Iterator[Window]:
    """Prepare a stream of examples in windows of bounded size, the next one while one is being encoded.

    Args:
        processor: Of the backbone.
        examples: Read lazily, a few hundred at a time.
        bad: Given the examples whose pictures cannot be opened; they are in no window. Those that are among them
            already are passed over.
        group: Bring examples of the same picture together, so that each picture is opened once. This needs a
            sequence; else, and of any other iterable, windows are in the order of the examples.
        observe: Shown every picture that was opened; in the thread that does it.
        progress: Show a progress bar if it takes more than two seconds.
    """
    total = len(examples) if isinstance(examples, Sequence) else None
    order: Iterable[tuple[int, Example]] = enumerate(examples)
    if group and isinstance(examples, Sequence):
        order = ((row, examples[row]) for row in by_picture(examples))
    found_before = {row.position for row in bad}
    waiting: deque[tuple[int, Example]] = deque()  # read, by another thread, and not yet prepared

    def noted() -> Iterator[Example]:
        for position, example in order:
            if position not in found_before:
                waiting.append((position, example))
                yield example

    with tqdm(total=total, desc="encode", unit="row", delay=2, disable=not progress) as bar:
        for outcomes in read_ahead(prepare_outcomes(processor, noted(), observe=observe)):
            window = Window([], [], [])
            for outcome in outcomes:
                position, example = waiting.popleft()
                if isinstance(outcome, ExampleError):
                    bad.add(position, example, outcome)
                else:
                    window.positions.append(position)
                    window.ids.append(example.id)
                    window.prepared.append(outcome)
            if window.prepared:
                yield window
            bar.update(len(outcomes))


def read_all(reader: FeatureReader, examples: Iterable[Example], bad: BadRows, *, progress: bool = False) -> Features:
    """Read the features of all examples, and hold them: what a reader without a keeper remembers is the result itself.

    Args:
        reader: A new one, with `recall_bytes` of infinity.
        examples: The examples.
        bad: Given those whose pictures cannot be opened.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        float32, shape (examples that are not bad, taps, hidden), in the order of the examples.
    """
    shape = len(reader.taps), reader.backbone.hidden_size
    stream = windows(reader.backbone.processor, examples, bad, group=True, progress=progress)
    if not isinstance(examples, Sequence):
        return np.concatenate([np.zeros((0, *shape), np.float32), *(reader.read(w.prepared, w.ids) for w in stream)])
    features = np.empty((len(examples), *shape), dtype=np.float32)
    for window in stream:
        features[window.positions] = reader.look_up(window.prepared, window.ids)
        reader.remember(window.prepared, (features[position] for position in window.positions))
    return _without(features, [row.position for row in bad])


def _without(features: Features, rows: Sequence[int]) -> Features:
    """Take rows out, in place: features may fill much of the memory."""
    gone = set(rows)
    kept = [row for row in range(len(features)) if row not in gone] if gone else []
    for place, row in enumerate(kept):
        if place != row:
            features[place] = features[row]
    return features[: len(features) - len(gone)]
