"""Map the labels of a data set, words or numbers, to class 0 or 1, by one rule for every format."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.locating import CellError
from qwen_vl_classifier.errors import ConfigError, DataError, first_of, shown

PLAIN_NAMES = ("0", "1")
"""What the classes are called where the data has no words for them."""

_TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1}
_WHOLE_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})(\.0*)?")
_MOST_COUNTED = 1000  # different labels; a column with more is no column of labels
_MOST_LISTED = 10


class NamedLabel(int):
    """A label that is a number with a name, as Hugging Face's `ClassLabel` has them.

    Attributes:
        name: What its data set calls it.
    """

    name: str

    def __new__(cls, number: int, name: str) -> NamedLabel:
        """Make a number with a name."""
        label = super().__new__(cls, number)
        label.name = name
        return label


def label_text(value: object) -> str | None:
    """Return the text by which a label is compared, or `None` for a value that cannot be a label.

    Surrounding blanks and the type do not count: 1, 1.0, "1" and " 1.0 " are one label, and so are True and "TRUE".

    Example:
        >>> [label_text(value) for value in (" yes ", 1, 1.0, Decimal(1), "1.0", True, "TRUE", [1])]
        ['yes', '1', '1', '1', '1', 'true', 'true', None]
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, str):
        text = value.strip()
        if not text.isascii():
            return unicodedata.normalize("NFC", text)
        if _WHOLE_NUMBER.fullmatch(text):
            return str(int(text.partition(".")[0]))
        return lowered if (lowered := text.lower()) in _TRUTH else text
    if isinstance(value, NamedLabel):
        return label_text(value.name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    return None


class Labels:
    """Read the labels of one data set, and count them.

    Without words, a label is 0 or 1 as a number, a truth value or a text of these. With `positive`, that label is 1 and
    every other 0. With `class_names`, those words stand for their classes, as do 0 and 1; if class 1 is called X and
    class 0 "not X", every other word is 0.

    Args:
        positive: The label that counts as 1.
        class_names: What class 0 and class 1 are called.
        required: Refuse rows without a label.
        soft: Take any number from 0 to 1, the probability of class 1.

    Attributes:
        refused: Whether any label stood for neither class.
        counts: How many rows have each label, by its text; "" counts all further ones after 1000 different labels.

    Raises:
        ConfigError: Options that contradict each other.
    """

    def __init__(
        self,
        *,
        positive: str | None = None,
        class_names: tuple[str, str] | None = None,
        required: bool = False,
        soft: bool = False,
    ) -> None:
        if soft and positive is not None:
            raise ConfigError(
                f"{spelled('soft_labels', True)} with {spelled('positive', positive)}; soft labels are numbers: leave "
                "one of them out"
            )
        self.counts: Counter[str] = Counter()
        self.refused = False
        self._positive = None if positive is None else label_text(positive)
        if self._positive == "":
            raise ConfigError(f"{spelled('positive')} is blank; expected the label that counts as 1")
        self._required, self._soft = required, soft
        self._names: tuple[str, str] | None = None
        if class_names is not None and tuple(class_names) != PLAIN_NAMES:
            self._names = _texts(class_names)
            if self._positive == self._names[0]:
                raise ConfigError(
                    f"{spelled('positive', positive)}, but class 0 is called {class_names[0]!r}; class 1 is called "
                    f"{class_names[1]!r}: leave {spelled('positive')} out, or give that"
                )
            # Where classes are called by numbers or truth values, a number is a name and nothing else.
            self._takes_truth = set(self._names) == {"false", "true"} or not any(map(_is_number_text, self._names))
            self._is_rest = self._names[0] == f"not {self._names[1]}"

    def read(self, value: object) -> tuple[float | int | None, str | None]:
        """Return the class of a label, and its word in the data where it has one.

        Raises:
            CellError: It stands for neither class.
        """
        if value is None or (isinstance(value, Decimal) and value.is_nan()):
            if self._required:
                raise CellError(f"is null, expected {self._expected()}")
            return None, None
        text = label_text(value)
        if not text:
            or_null = "" if text is None else " or null"
            raise CellError(f"is {shown(value)}, expected {self._expected()}{or_null}")
        known = isinstance(value, NamedLabel) or (self._names is not None and text in self._names)
        if self._soft and not known:
            return _soft(value, text), None
        label, word = self._class_of(value, text)
        counted = text if label == 1 or text in self.counts or len(self.counts) < _MOST_COUNTED else ""
        self.counts[counted] += 1
        if label is None:
            self.refused = True
            number = isinstance(value, (int, float, Decimal)) and not isinstance(value, NamedLabel)
            advice = "" if self._names or number else f", or {spelled('positive')} to say which word counts as 1"
            seen = shown(text) if isinstance(value, NamedLabel) else shown(value)
            near = _near(text, self._names or ())
            raise CellError(f"is {seen}, expected {self._expected()}{advice}{near}")
        return label, word

    def check(self, name: str) -> None:
        """Make sure, when all rows are read, that the words given for the classes occur in the data.

        Args:
            name: The data set, for messages.

        Raises:
            DataError: No row has the label that stands for class 1, or labels differ from it in case alone.
        """
        expected = self._positive
        if expected is None and self._names is not None and self._is_rest:
            expected = self._names[1]
            if all(text in (*self._names, *_TRUTH) for text in self.counts):
                return  # no other word was counted as class 0
        if expected is None or not self.counts:
            return
        alike = [text for text in self.counts if text != expected and folded(text) == folded(expected)]
        if expected not in self.counts:
            given = spelled("positive", expected) if self._positive is not None else f"class 1 is called {expected!r}"
            near = f"; did you mean {alike[0]!r}?" if alike else _near(expected, self.counts)
            raise DataError(
                f"{given}, but no row of {name} has that label; expected one of its labels: {self.listed()}; give "
                f"the one that counts as 1 with {spelled('positive')}{near}"
            )
        if alike:
            raise DataError(
                f"labels of {name} differ only in case or spacing: {self.listed([expected, *alike])}; expected one "
                f"spelling, since all but {expected!r} would count as 0; write them alike"
            )

    def listed(self, texts: Iterable[str] | None = None) -> str:
        """List labels with how many rows have each, the most frequent first."""
        return listed_counts({text: self.counts[text] for text in texts} if texts else self.counts, "rows")

    def _class_of(self, value: object, text: str) -> tuple[int | None, str | None]:
        if self._positive is not None:
            return int(text == self._positive), text
        if self._names is not None:
            if text in self._names:
                return self._names.index(text), text
            if self._takes_truth and text in _TRUTH:
                return _TRUTH[text], None
            return (0, text) if self._is_rest else (None, None)
        if isinstance(value, NamedLabel) and text not in _TRUTH:
            return (int(value), text) if value in (0, 1) else (None, None)
        return _TRUTH.get(text), None

    def _expected(self) -> str:
        if self._soft:
            return "a number from 0 to 1"
        if self._positive is not None:
            return "a word, a number or a truth value"
        if self._names is None:
            return "0 or 1"
        known = f"{self._names[0]!r} or {self._names[1]!r}"
        return f"{known} (or 0 or 1)" if self._takes_truth else known


def listed_counts(counts: Mapping[str, int], what: str) -> str:
    """List words with their counts, the most frequent first, in one line of bounded length."""
    order = sorted(counts, key=lambda text: (-counts[text], text))
    named = [f"{counts[text]:,} {what if counts[text] != 1 else what.removesuffix('s')}" for text in order]
    return first_of([f"{shown(text)} ({many})" for text, many in zip(order, named, strict=True)], most=_MOST_LISTED)


def class_names_of(examples: Iterable[Example]) -> tuple[str, str]:
    """Return what the data calls class 0 and class 1; class 0 is "not X" if several words stand for it.

    Args:
        examples: With labels; those without `label_text` do not count.
    """
    words: tuple[set[str], set[str]] = (set(), set())
    for example in examples:
        if example.label_text is not None and example.label in (0, 1):
            words[int(example.label)].add(example.label_text)
    if len(words[1]) != 1:
        return PLAIN_NAMES
    (positive,) = words[1]
    return (min(words[0]) if len(words[0]) == 1 else f"not {positive}", positive)


def _near(text: str, words: Iterable[str]) -> str:
    """Return the end of a message that suggests the word which was probably meant, or "" if none is near."""
    found = difflib.get_close_matches(text, [word for word in words if word], n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found else ""


def _texts(class_names: tuple[str, str]) -> tuple[str, str]:
    negative, positive = (label_text(name) or "" for name in class_names)
    if not negative or not positive or negative == positive:
        raise ConfigError(f"class names {class_names[0]!r} and {class_names[1]!r}; expected two different words")
    return negative, positive


def _is_number_text(text: str) -> bool:
    return text in _TRUTH or _WHOLE_NUMBER.fullmatch(text) is not None


def folded(text: str) -> str:
    """Return a word or a name without differences that are hard to see: case, surrounding spaces, forms of a letter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _soft(value: object, text: str) -> float | int:
    try:
        number = float(_TRUTH.get(text, value))  # type: ignore[arg-type]  # what cannot be a number raises
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise CellError(f"is {shown(value)}, expected a number from 0 to 1")
    return int(number) if number in (0, 1) else number
