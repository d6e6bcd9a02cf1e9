"""Every error that this package raises on purpose.

::

    QwenVLClassifierError
    ├── ConfigError           (ValueError)        an option or argument is out of its range
    ├── DataError             (ValueError)        rows, columns or labels of a data set
    │   ├── ImageError                            a picture that cannot, or must not, be opened
    │   └── BatchError                            tensors handed to a training step do not fit together
    ├── CheckpointError       (OSError)           a backbone cannot be found, read or used
    ├── ArtifactError         (ValueError)        a saved classifier or weights file is not what it should be
    ├── FeatureStoreError     (OSError)           kept features cannot be read or written
    ├── OutOfMemoryError           (MemoryError)       the device ran out of memory
    ├── TrainingError         (ArithmeticError)   a training run cannot go on
    ├── StoppedError          (RuntimeError)      a training run was asked to stop, and saved its state
    ├── MissingExtraError     (ImportError)       an optional dependency is not installed
    ├── OldVersionError       (ImportError)       a dependency is too old
    ├── QueueFullError        (RuntimeError)      a server has too much to do already
    ├── DeadlineError         (TimeoutError)      a server had no result in time
    └── ClosedError           (RuntimeError)      a server is closing

Each message is one line that says what was seen, what was wanted and what to do. The command line prints that
line and exits with status 2; anything else keeps its traceback, because it is a defect.
"""


class QwenVLClassifierError(Exception):
    """Base class of all errors below: catch it to handle every expected failure."""


class ConfigError(QwenVLClassifierError, ValueError):
    """An option or argument is out of its range."""


class DataError(QwenVLClassifierError, ValueError):
    """Rows, columns or labels of a data set are not usable."""


class ImageError(DataError):
    """A picture cannot be opened, or is refused for its size, shape or format."""


class BatchError(DataError):
    """The tensors of a batch do not fit together."""


class CheckpointError(QwenVLClassifierError, OSError):
    """A backbone cannot be found, read or used."""


class ArtifactError(QwenVLClassifierError, ValueError):
    """A saved classifier, or a file of classifier weights, is not what it should be."""


class FeatureStoreError(QwenVLClassifierError, OSError):
    """Kept features cannot be read or written."""


class OutOfMemoryError(QwenVLClassifierError, MemoryError):
    """The device ran out of memory; the message says what to lower."""


class TrainingError(QwenVLClassifierError, ArithmeticError):
    """A training run cannot go on, for example because its loss is not finite."""


class StoppedError(QwenVLClassifierError, RuntimeError):
    """A training run was asked to stop, and saved its state; the message says how to go on."""


class MissingExtraError(QwenVLClassifierError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class OldVersionError(QwenVLClassifierError, ImportError):
    """A dependency is older than this package needs; the message says how to upgrade it."""


class QueueFullError(QwenVLClassifierError, RuntimeError):
    """Too many items wait already.

    Attributes:
        retry_after: Seconds after which those that wait will probably be done, at least 1.
    """

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(QwenVLClassifierError, TimeoutError):
    """There was no result before the deadline."""


class ClosedError(QwenVLClassifierError, RuntimeError):
    """What was asked is closing and takes no more."""
