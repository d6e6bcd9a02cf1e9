"""Data files of text: their format by name, what they really hold, and their lines, also where they are packed."""

from __future__ import annotations

import gzip
import posixpath
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.images.file_kinds import KIND_BYTES, file_kind

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".tsv": "tsv",
    ".json": "json",
}
"""The format of a data file by the end of its name, in lower case; those of text may end in `.gz` after that."""

UNITS = {"jsonl": "line", "csv": "line", "tsv": "line", "json": "row", "parquet": "row"}
"""What the number of a row counts, by format."""

MAX_ROW_BYTES = 1 << 24
"""Most bytes of a row in a file of text, with columns that are not used: pictures are named there, not contained."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_PACKED = ".gz"
_GZIP_START = b"\x1f\x8b"
_PASSED_OVER = 1 << 20  # bytes of a line that is too long, at a time
_NO_TABLES = ("an HTML page", "an SVG drawing", "a Git LFS pointer", "a PDF document", "a PostScript document")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_JSON_ROWS = re.compile(rb'\s*(\[\s*)?\{\s*"')


def format_of(name: str) -> str | None:
    """Return the format of a data file by its name, or `None` if it is not one."""
    stem, suffix = posixpath.splitext(name.lower())
    if suffix != _PACKED:
        return FORMATS.get(suffix)
    kind = FORMATS.get(posixpath.splitext(stem)[1])
    return None if kind == "parquet" else kind


def unpacked(file: BinaryIO, name: str) -> BinaryIO:
    """Return the content of a data file; a packed one is unpacked as it is read.

    Seeking forward in a packed file unpacks what lies between, and seeking back begins again.

    Raises:
        DataError: Its first bytes are not text, or of another kind, such as an HTML page or a Git LFS pointer.
    """
    content = file
    start = file.read(KIND_BYTES)
    file.seek(0)
    if name.lower().endswith(_PACKED):
        if not start.startswith(_GZIP_START):
            raise DataError(
                f"{name} is {file_kind(start)}, not gzip; expected a file packed by gzip; rename it, or pack it"
            )
        content = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        with refusing_damage(name):
            start = content.read(KIND_BYTES)
            content.seek(0)
    _check_start(start, name)
    return content


@contextmanager
def refusing_damage(name: str) -> Iterator[None]:
    """Turn what reading a damaged packed file raises into a `DataError`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is damaged ({error}); expected a whole gzip file; pack it again") from None


def row_too_long(size: int) -> str:
    """Return what is wrong with a row of too many bytes."""
    return f"a row of {size:,} bytes, expected at most {MAX_ROW_BYTES:,}"


class LongLine(bytes):
    """What is left of a line of more than `MAX_ROW_BYTES`: its quotes, as far as they open or close a cell.

    Attributes:
        size: Bytes of the line.
    """

    size: int

    def __new__(cls, size: int, quotes: int) -> LongLine:
        """Make it from the number of bytes of the line and the number of its quotes."""
        line = super().__new__(cls, b'"' * (quotes % 2) + b"\n")
        line.size = size
        return line


def size_of(line: bytes) -> int:
    """Return how many bytes a line has in its file."""
    return line.size if isinstance(line, LongLine) else len(line)


def bounded_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a file; of one that is too long, a `LongLine`: no more of it is held.

    Raises:
        DataError: The file is packed and breaks off.
    """
    with refusing_damage(name):
        while line := file.readline(MAX_ROW_BYTES + 1):
            yield _passed_over(file, line) if len(line) > MAX_ROW_BYTES else line


def _passed_over(file: BinaryIO, line: bytes) -> LongLine:
    size, quotes, part = len(line), line.count(b'"'), line
    while not part.endswith(b"\n") and (part := file.readline(_PASSED_OVER)):
        size += len(part)
        quotes += part.count(b'"')
    return LongLine(size, quotes)


def encoding_of(content: bytes, error_at: int) -> str:
    """Describe the encoding of a text that is not UTF-8.

    Args:
        content: The text, or a line of it.
        error_at: Index of the first byte that is not UTF-8.
    """
    if content.startswith(_UTF16):
        return "UTF-16, as Excel's Unicode text is"
    try:
        around = content[max(0, error_at - 12) : error_at + 12].decode("cp1252")
    except UnicodeDecodeError:
        return "not UTF-8"
    return f"not UTF-8, but probably Windows-1252 or Latin-1 (it contains {around.strip()!r})"


def _check_start(start: bytes, name: str) -> None:
    """Refuse a file that is of another kind than its name says."""
    if start.startswith(_UTF16):
        raise DataError(f"{name} is UTF-16, as Excel's Unicode text is; expected UTF-8; save it as CSV UTF-8")
    if start.strip(b"\0") and any(len(start) > 3 and not any(start[first::2]) for first in (0, 1)):
        raise DataError(f"{name} is UTF-16 without a mark at its start; expected UTF-8; save it as CSV UTF-8")
    if format_of(name) in ("csv", "tsv") and _JSON_ROWS.match(start.removeprefix(BYTE_ORDER_MARK)):
        raise DataError(f"{name} holds JSON; expected a table of text; name it .json, or .jsonl for one object a line")
    kind = file_kind(start)
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)
    if kind.startswith(_NO_TABLES) if is_text else kind != "a file of another kind":
        raise DataError(f"{name} is {kind}, not what its name says; expected a table of rows; get the file itself")
