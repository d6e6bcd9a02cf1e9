"""Text data files, compressed or not: their format by name, what they really hold, and their lines."""

from __future__ import annotations

import codecs
import gzip
import io
import posixpath
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

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

_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
_PACKED = ".gz"
_GZIP_START = b"\x1f\x8b"
_CONVERTED = 1 << 16  # bytes of UTF-16 at a time
_PASSED_OVER = 1 << 20  # bytes of a line that is too long, at a time
_NO_TABLES = ("an HTML page", "an SVG drawing", "a Git LFS pointer", "a PDF document", "a PostScript document")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_JSON_ROWS = re.compile(rb'\s*(\[\s*)?\{\s*"')


def format_of(name: str) -> str | None:
    """Return the format of a data file by its name, or `None` if it is not one."""
    stem, suffix = posixpath.splitext(name.lower())
    if suffix != _PACKED:
        return FORMATS.get(suffix)
    kind = FORMATS.get(posixpath.splitext(stem)[1])
    return None if kind == "parquet" else kind


def unpacked(file: BinaryIO, name: str) -> BinaryIO:
    """Return the content of a data file as UTF-8: a packed one is unpacked as it is read, and UTF-16 is converted.

    Seeking forward in such a file reads what lies between, and seeking back begins again.

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
    if start.startswith(UTF16_MARKS):
        content = cast(BinaryIO, io.BufferedReader(_FromUtf16(content, name)))
        start = content.read(KIND_BYTES)
        content.seek(0)
    _check_start(start, name)
    return content


class _FromUtf16(io.RawIOBase):
    """A file of UTF-16 text, as Excel saves "Unicode text", read as UTF-8 without the mark at its start.

    Args:
        file: The file, at any place.
        name: The file, for messages.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._decoder = codecs.getincrementaldecoder("utf-16")()
        self._converted = b""  # and not read yet
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        while not self._converted:
            part = self._file.read(_CONVERTED)
            try:
                self._converted = self._decoder.decode(part, final=not part).encode()
            except UnicodeError:
                raise DataError(f"{self._name} is damaged UTF-16; expected UTF-8; save it as CSV UTF-8") from None
            if not part:
                break
        taken = self._converted[: len(buffer)]
        buffer[: len(taken)] = taken
        self._converted = self._converted[len(taken) :]
        self._position += len(taken)
        return len(taken)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence != io.SEEK_SET:
            raise io.UnsupportedOperation("the size of converted text is not known")
        if offset < self._position:
            self._begin()
        while self._position < offset and self.read(min(offset - self._position, _CONVERTED)):
            pass
        return self._position


def advice_for(suffix: str) -> str:
    """Return what to do with a file whose name does not end in the format of a data file."""
    if suffix.lower() in _SPREADSHEETS:
        return "open it in a spreadsheet program and save it as CSV UTF-8"
    return "rename it to .csv if it is a table" if suffix.lower() == ".txt" else "convert or rename it"


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
    try:
        around = content[max(0, error_at - 12) : error_at + 12].decode("cp1252")
    except UnicodeDecodeError:
        return "not UTF-8"
    return f"not UTF-8, but probably Windows-1252 or Latin-1 (it contains {around.strip()!r})"


def _check_start(start: bytes, name: str) -> None:
    """Refuse a file that is of another kind than its name says."""
    if start.strip(b"\0") and any(len(start) > 3 and not any(start[first::2]) for first in (0, 1)):
        raise DataError(f"{name} is UTF-16 without a mark at its start; expected UTF-8; save it as CSV UTF-8")
    if format_of(name) in ("csv", "tsv") and _JSON_ROWS.match(start.removeprefix(BYTE_ORDER_MARK)):
        raise DataError(f"{name} holds JSON; expected a table of text; name it .json, or .jsonl for one object a line")
    kind = file_kind(start)
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)
    if kind.startswith(_NO_TABLES) if is_text else kind != "a file of another kind":
        raise DataError(f"{name} is {kind}, not what its name says; expected a table of rows; download the file itself")
