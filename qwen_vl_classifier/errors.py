"""Every error that this package raises on purpose.

::

    QwenVLClassifierError
    ├── ConfigError           (ValueError)        an option or argument is out of its range
    ├── DataError             (ValueError)        rows, columns or labels of a data set
    │   ├── ImageError                            a picture that cannot be opened, or is refused
    │   ├── TextError                             a text that is longer than the model or a limit allows
    │   ├── ExplanationError                      an explanation that takes more passes or time than a limit allows
    │   └── BatchError                            tensors handed to a training step do not fit together
    ├── CheckpointError       (OSError)           a backbone cannot be found, read or used
    ├── ArtifactError         (ValueError)        a saved classifier or weights file is not what it should be
    ├── FeatureStoreError     (OSError)           kept features cannot be read or written
    ├── JournalError          (OSError)           answers of labelling cannot be read or saved
    ├── NotCurrentError       (LookupError)       an answer is to a question that labelling does not have
    ├── OutOfMemoryError      (MemoryError)       the device ran out of memory
    ├── TrainingError         (ArithmeticError)   a training run cannot continue
    ├── ScoringError          (RuntimeError)      a run of scoring cannot continue
    ├── ErrorLimitError       (RuntimeError)      a run of scoring has more errors than its limit
    ├── StoppedError          (RuntimeError)      a run was stopped, and saved its progress
    ├── MissingExtraError     (ImportError)       an optional dependency is not installed
    ├── OldVersionError       (ImportError)       a dependency is too old
    ├── EngineError           (RuntimeError)      a server of another engine does not answer as it should
    ├── QueueFullError        (RuntimeError)      a server is overloaded
    ├── DeadlineError         (TimeoutError)      a server had no result before the deadline
    └── ClosedError           (RuntimeError)      a server is closing

Each message is one line that says what was seen, what was expected and what to do. The command line prints that
line and exits with status 2; anything else keeps its traceback, because it is a defect.
"""

import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Literal, TypeAlias

_brief = reprlib.Repr()
_brief.maxstring = 80

_NOT_SHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode
_SHOWN = "\n\t\u200c\u200d"  # scripts and emoji are written with the last two, which join and part letters

ImageCode: TypeAlias = Literal["image_missing", "image_refused", "image_too_large", "image_format", "image_damaged"]
"""What is wrong with a picture, for programs.

In order: it does not exist; it is refused (a URL or path that is not allowed, or no regular file); it exceeds a limit
on bytes, pixels or shape; its format is not supported; it cannot be decoded.
"""


class QwenVLClassifierError(Exception):
    """Base class of all errors below: catch it to handle every expected failure."""


class ConfigError(QwenVLClassifierError, ValueError):
    """An option or argument is out of its range."""


class DataError(QwenVLClassifierError, ValueError):
    """Rows, columns or labels of a data set are not usable."""


class ImageError(DataError):
    """A picture cannot be opened, or is refused for its size, shape or format.

    Attributes:
        code: The kind of problem, for programs.
    """

    def __init__(self, message: str, *, code: ImageCode = "image_damaged") -> None:
        super().__init__(message)
        self.code = code


class TextError(DataError):
    """A text is longer than the model or a limit allows.

    Attributes:
        code: The kind of problem, for programs.
    """

    code: Literal["text_too_large"] = "text_too_large"


class ExplanationError(DataError):
    """An explanation takes more tokens, passes or seconds than a limit allows.

    Attributes:
        code: The kind of problem, for programs.
    """

    code: Literal["explanation_too_large"] = "explanation_too_large"


ExampleError: TypeAlias = ImageError | TextError
"""Errors of a single example; other examples can still be used."""


class BatchError(DataError):
    """The tensors of a batch do not fit together."""


class CheckpointError(QwenVLClassifierError, OSError):
    """A backbone cannot be found, read or used."""


class ArtifactError(QwenVLClassifierError, ValueError):
    """A saved classifier, or a file of classifier weights, is not what it should be."""


class FeatureStoreError(QwenVLClassifierError, OSError):
    """Kept features cannot be read or written."""


class JournalError(QwenVLClassifierError, OSError):
    """Answers of labelling cannot be read or saved; an answer that was not saved does not count."""


class NotCurrentError(QwenVLClassifierError, LookupError):
    """An answer is to a question that labelling does not have."""


class OutOfMemoryError(QwenVLClassifierError, MemoryError):
    """The device ran out of memory; the message says what to lower."""


class TrainingError(QwenVLClassifierError, ArithmeticError):
    """A training run cannot continue, for example because its loss is not finite."""


class ScoringError(QwenVLClassifierError, RuntimeError):
    """A run of scoring cannot continue, for example because its workers die and no row is the cause."""


class ErrorLimitError(QwenVLClassifierError, RuntimeError):
    """A run of scoring has more errors than its limit; finished shards are kept."""


class StoppedError(QwenVLClassifierError, RuntimeError):
    """A run of training or scoring was stopped, and saved its progress; the message says how to continue."""


class MissingExtraError(QwenVLClassifierError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class OldVersionError(QwenVLClassifierError, ImportError):
    """A dependency is older than this package needs; the message says how to upgrade it."""


class EngineError(QwenVLClassifierError, RuntimeError):
    """A server of another engine does not answer, or not with the probabilities of the exported classifier."""


class QueueFullError(QwenVLClassifierError, RuntimeError):
    """The queue is full.

    Attributes:
        retry_after: Seconds until the queue is probably empty, at least 1.
    """

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(QwenVLClassifierError, TimeoutError):
    """There was no result before the deadline."""


class ClosedError(QwenVLClassifierError, RuntimeError):
    """The server is closing and accepts no more requests."""


def shown(value: object) -> str:
    """Describe a value in a message: briefly, and never by an object's own `repr`.

    Example:
        >>> shown("a dog"), shown([1, 2])
        ("'a dog'", 'of type list')
    """
    return _brief.repr(value) if isinstance(value, (str, float, int)) else f"of type {type(value).__name__}"


def printable(text: str) -> str:
    r"""Replace characters that control a terminal, or that it cannot show, by JSON's escapes.

    These are control characters but for line breaks and tabs, signs that turn the direction of writing or have no
    width, other separators of lines, and halves of surrogate pairs. JSON stays the same JSON.

    Example:
        >>> print(printable("a \x1b[2J cat"))
        a \u001b[2J cat
    """
    if text.replace("\n", "").replace("\t", "").isprintable():  # most texts, and far faster than each character
        return text
    return "".join(map(_printable, text))


def one_line(text: object, most: int = 500) -> str:
    """Return a text from outside as one printable line, shortened in its middle if it is long."""
    line = printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= most else f"{line[: most // 2]}...{line[-most // 2 :]}"


def _printable(character: str) -> str:
    if character in _SHOWN or unicodedata.category(character) not in _NOT_SHOWN:
        return character
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def first_of(items: Sequence[object], most: int = 10, separator: str = ", ") -> str:
    """Join the first items of a list for a message, and say how many more there are.

    Example:
        >>> first_of(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(map(str, items[:most])) + more


def one_of(names: Sequence[str]) -> str:
    """Join alternatives for a message: "JPEG, PNG or WebP"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
