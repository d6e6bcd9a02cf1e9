"""Features of all rows of a pool, and what is computed once for each tap: standardisation and short sketches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.training.probe.candidates import distinct_taps
from qwen_vl_classifier.training.probe.heads import Standardised
from qwen_vl_classifier.training.splitting import RowNumbers

SKETCH = 64
"""Numbers that stand for the features of a row where rows are compared with each other."""

AXES = 512
"""Of wider features, the axes along which those of the pool vary most; heads are trained on these alone, in a tenth of
the time."""

_SAMPLE = 4096  # rows that tell mean and deviation of a pool, and which taps differ
_CHUNK = 8192  # rows whose features are in memory at once


@dataclass(frozen=True, slots=True)
class Sketch:
    """Short stand-ins for the standardised features of every row.

    Attributes:
        points: float32, shape (n, numbers + 1); the last of each is 1, for an intercept.
        moment: float64, the mean of the outer products of a point with itself.
    """

    points: npt.NDArray[np.float32]
    moment: Float


class PoolFeatures:
    """Features of all rows of a pool, in memory or in a file that is mapped.

    It may be used by several threads.

    Args:
        features: Shape (n, taps, hidden), floats of any size.
        taps: In the order of the features.
        groups: Shape (n,): rows of one number belong together, as those of one picture.
        seed: Of the sketches.

    Attributes:
        taps: All taps.
        groups: Shape (n,), numbers from 0 without gaps.
    """

    def __init__(
        self, features: npt.NDArray[np.floating], taps: Sequence[Tap], groups: npt.NDArray[np.integer], *, seed: int = 0
    ) -> None:
        self._features = features
        self.taps = tuple(taps)
        self.groups: RowNumbers = np.unique(groups, return_inverse=True)[1].astype(np.int64)
        self._seed = seed
        rng = np.random.default_rng(seed)
        rows = len(features)
        self._sample = np.sort(rng.choice(rows, _SAMPLE, replace=False)) if rows > _SAMPLE else np.arange(rows)
        self._distinct: list[Tap] | None = None
        self._scales: dict[Tap, _Scale] = {}
        self._sketches: dict[Tap, Sketch] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._features)

    @property
    def hidden(self) -> int:
        """Number of features of a row at a tap."""
        return int(self._features.shape[2])

    @property
    def distinct(self) -> list[Tap]:
        """The taps that are worth trying, the earlier layer first."""
        with self._lock:
            if self._distinct is None:
                self._distinct = [
                    self.taps[number] for number in distinct_taps(self._features[self._sample], self.taps)
                ]
            return self._distinct

    @property
    def usual(self) -> Tap:
        """The tap to read while no labels speak for another: the deepest, of the last token where there is a choice.

        It is where the language model itself reads what to answer.
        """
        return self.distinct[-1]

    def inputs(self, tap: Tap, rows: RowNumbers) -> torch.Tensor:
        """Return what heads are trained on, shape (rows, `AXES` or fewer): features with the pool's mean and deviation.

        A few labelled rows would tell mean and deviation badly, and rows without a label tell them as well.

        Raises:
            TrainingError: A feature is not finite.
        """
        scale = self._scale(tap)
        inputs = (torch.from_numpy(self._read(tap, rows)) - scale.centre) / scale.deviation
        if not torch.isfinite(inputs).all():
            raise _not_finite(tap)
        return inputs if scale.axes is None else inputs @ scale.axes

    def unfolded(self, tap: Tap, coefficients: Float, intercept: float) -> tuple[Float, float]:
        """Return weights and bias, on features as they are, of a head on `inputs`."""
        scale = self._scale(tap)
        weights = torch.from_numpy(coefficients)
        if scale.axes is not None:
            weights = scale.axes.double() @ weights
        weights = weights / scale.deviation.double()
        return weights.numpy(), intercept - float(weights @ scale.centre.double())

    def margins(self, tap: Tap, weights: Float, bias: float) -> Float:
        """Return the margin of every row, shape (n,), by a linear head on features as they are.

        Raises:
            TrainingError: A feature is not finite.
        """
        narrow = weights.astype(np.float32)
        found = np.empty(len(self))
        for start in range(0, len(self), _CHUNK):
            found[start : start + _CHUNK] = self._read(tap, slice(start, start + _CHUNK)) @ narrow
        if not np.isfinite(found).all():
            raise _not_finite(tap)
        return found + bias

    def sketch(self, tap: Tap) -> Sketch:
        """Return a sketch of the features at a tap.

        A random projection keeps products of rows, roughly (Johnson and Lindenstrauss, 1984, "Extensions of Lipschitz
        mappings into a Hilbert space"; Dasgupta and Gupta, 2003, "An elementary proof of a theorem of Johnson and
        Lindenstrauss").
        """
        with self._lock:
            if tap not in self._sketches:
                points = self._project(tap)
                moment = (points.T @ points).astype(np.float64) / len(points)
                self._sketches[tap] = Sketch(points, moment)
            return self._sketches[tap]

    def _project(self, tap: Tap) -> npt.NDArray[np.float32]:
        scale = self._scale(tap)
        width = len(scale.centre)
        if width <= SKETCH:
            turn = torch.eye(width)
        else:
            generator = torch.Generator().manual_seed(self._seed)
            turn = torch.randn(width, SKETCH, generator=generator) / SKETCH**0.5
        turn = turn / scale.deviation[:, None]
        shift = (scale.centre @ turn).numpy()
        found = np.ones((len(self), turn.shape[1] + 1), dtype=np.float32)
        for start in range(0, len(self), _CHUNK):
            part = torch.from_numpy(self._read(tap, slice(start, start + _CHUNK)))
            found[start : start + _CHUNK, :-1] = (part @ turn).numpy() - shift
        return found

    def _scale(self, tap: Tap) -> _Scale:
        with self._lock:
            if tap not in self._scales:
                data = Standardised.of(self._read(tap, self._sample))
                axes = _axes(data.inputs, self._seed) if data.inputs.shape[1] > AXES else None
                self._scales[tap] = _Scale(data.mean, data.scale, axes)
            return self._scales[tap]

    def _read(self, tap: Tap, rows: RowNumbers | slice) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(self._features[rows, self.taps.index(tap)], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Scale:
    """How features of a tap become inputs of a head.

    Attributes:
        centre: Shape (hidden,).
        deviation: Shape (hidden,).
        axes: Shape (hidden, `AXES`), orthonormal columns; `None` where features are few.
    """

    centre: torch.Tensor
    deviation: torch.Tensor
    axes: torch.Tensor | None


def _axes(inputs: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the axes of most variance (Halko, Martinsson and Tropp, 2011, "Finding structure with randomness")."""
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(inputs.T @ (inputs @ torch.randn(inputs.shape[1], AXES, generator=generator)))
    turned: torch.Tensor = torch.linalg.qr(inputs.T @ (inputs @ axes))[0]
    return turned


def _not_finite(tap: Tap) -> TrainingError:
    return TrainingError(
        f"features at tap {tap} hold NaN or infinity; look for broken pictures, or load the backbone in float32"
    )
