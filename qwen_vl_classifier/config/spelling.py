"""Name an option in a message as its reader would write it, and suggest what a misspelled word was meant to be."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_CLOSE = 0.7  # of `difflib`'s ratio: 'trian' and 'train' have 0.8

_flags_in_use = False


def spelled(name: str, value: Any = None, *, flag: str = "") -> str:
    """Return an option as the user of this process would write it.

    Args:
        name: The keyword, such as `allow_outside`.
        value: Its value; `True` for a switch, `None` to leave it open.
        flag: Name of the flag, where it is another than that of the keyword.

    Example:
        >>> spelled("allow_outside", True), spelled("text_column"), spelled("positive", "a dog")
        ('allow_outside=True', 'text_column=', "positive='a dog'")
        >>> with naming_flags():
        ...     spelled("allow_outside", True), spelled("text_column"), spelled("positive", "a dog")
        ('--allow-outside', '--text-column', "--positive 'a dog'")
    """
    if not _flags_in_use:
        return f"{name}={'' if value is None else repr(value)}"
    flag = f"--{(flag or name).replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {shlex.quote(str(value))}"


def named(name: str) -> str:
    """Return the name of an option alone, as the user of this process would write it: `--id-column` or `id_column`."""
    return f"--{name.replace('_', '-')}" if _flags_in_use else name


def flags_in_use() -> bool:
    """Tell whether options are named as flags."""
    return _flags_in_use


@contextmanager
def naming_flags(in_use: bool = True) -> Iterator[None]:
    """Name options as flags until the block ends, in all threads; the command line does so, and so do its workers.

    Args:
        in_use: False names them as keywords.
    """
    before = _flags_in_use
    name_flags(in_use)
    try:
        yield
    finally:
        name_flags(before)


def name_flags(in_use: bool) -> None:
    """Name options as flags, or not, for good: a worker process does as its driver does."""
    global _flags_in_use
    _flags_in_use = in_use


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the end of a message, or nothing where no known word is much like this one.

    Example:
        >>> did_you_mean("trian", ("train", "score")), did_you_mean("zebra", ("train", "score"))
        ("; did you mean 'train'?", '')
    """
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=_CLOSE)
    return f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""
