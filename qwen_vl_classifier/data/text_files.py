"""Data files of text: which they are by name, what they really hold, and their lines, also where they are packed."""

from __future__ import annotations

import gzip
import json
import posixpath
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from qwen_vl_classifier.data.table import Row
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

_PACKED = ".gz"
_GZIP_START = b"\x1f\x8b"
_MAX_LINE = 1 << 28  # bytes of one line: a packed file of megabytes can hold one without end
_MAX_JSON = 1 << 30  # bytes of a JSON array, which is read whole
_NO_TABLES = ("an HTML page", "an SVG drawing", "a Git LFS pointer", "a PDF document", "a PostScript document")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a packed file raises
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_ROWS = re.compile(rb'\s*(\[\s*)?\{\s*"')


def format_of(name: str) -> str | None:
    """Return the format of a data file by its name, or `None` if it is no such file."""
    stem, suffix = posixpath.splitext(name.lower())
    if suffix != _PACKED:
        return FORMATS.get(suffix)
    kind = FORMATS.get(posixpath.splitext(stem)[1])
    return None if kind == "parquet" else kind


def is_packed(name: str) -> bool:
    """Tell by its name whether a file is packed by gzip."""
    return name.lower().endswith(_PACKED)


def unpacked(file: BinaryIO, name: str) -> BinaryIO:
    """Return the content of a data file; that of a packed one is unpacked as it is read.

    Seeking forward in a packed file unpacks what lies between, and seeking back begins again.

    Raises:
        DataError: By its first bytes it is no text, such as an HTML page or a Git LFS pointer.
    """
    if not is_packed(name):
        _check_start(file.read(KIND_BYTES), name)
        file.seek(0)
        return file
    content = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    try:
        start = content.read(KIND_BYTES)
    except _DAMAGED as error:
        file.seek(0)
        kind = file_kind(packed_start := file.read(KIND_BYTES))
        if packed_start.startswith(_GZIP_START):
            raise _damaged(name, error) from None
        raise DataError(f"{name} is {kind}, not gzip; expected a file packed by gzip; rename it, or pack it") from None
    _check_start(start, name)
    content.seek(0)
    return content


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name} is damaged ({error}); expected a whole gzip file; pack it again")


def bounded_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        DataError: One is too long, or the file is packed and breaks off.
    """
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(_MAX_LINE + 1)
        except _DAMAGED as error:
            raise _damaged(name, error) from None
        if len(line) > _MAX_LINE:
            raise DataError(f"{name}, line {number}: more than {_MAX_LINE:,} bytes; expected one row; correct the file")
        if not line:
            return
        yield line


def json_values(file: BinaryIO, name: str) -> list[Any]:
    """Read a JSON array, or the lines of JSONL where each is an object, as some programs name them `.json`.

    Raises:
        DataError: It is neither, or too large.
    """
    try:
        content = file.read(_MAX_JSON + 1)
    except _DAMAGED as error:
        raise _damaged(name, error) from None
    if len(content) > _MAX_JSON:
        raise DataError(f"{name} has more than {_MAX_JSON:,} bytes; expected a smaller array; write it as JSONL")
    try:
        text = content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is {encoding_of(content, error.start)}; expected UTF-8; save it so") from None
    del content
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = text.splitlines()
        first = next((line for line in lines if line.strip()), "")
        try:
            if isinstance(json.loads(first), dict):
                return [json.loads(line) for line in lines if line.strip()]
        except (ValueError, RecursionError):
            pass
        raise DataError(
            f"{name} is not JSON ({str(error).splitlines()[0][:100]}); expected an array of objects [{{...}}, ...]; "
            "correct it, or name JSON lines .jsonl"
        ) from None
    if isinstance(values, dict) and not any(isinstance(value, (dict, list)) for value in values.values()):
        return [values]  # JSONL of a single row
    if not isinstance(values, list):
        keys = f" with {', '.join(map(repr, list(values)[:5]))}" if isinstance(values, dict) else ""
        raise DataError(
            f"{name} holds a JSON {type(values).__name__}{keys}; expected an array of objects [{{...}}, ...]; "
            "write the rows so, or as JSONL"
        )
    return values


def json_row(number: int, value: Any) -> Row:
    """Make a row of an item of a JSON array."""
    if not isinstance(value, dict):
        return Row(number, problem=f"a JSON {type(value).__name__}, wanted an object {{...}}")
    return Row(number, value)


def encoding_of(content: bytes, place: int) -> str:
    """Say in what encoding a text is that is not UTF-8.

    Args:
        content: The text, or a line of it.
        place: The first byte that is not UTF-8.
    """
    if content.startswith(_UTF16):
        return "UTF-16, as Excel's Unicode text is"
    word = content[max(0, place - 12) : place + 12]
    try:
        shown = word.decode("cp1252")
    except UnicodeDecodeError:
        return "not UTF-8"
    return f"not UTF-8, but probably Windows-1252 or Latin-1 (there {shown.strip()!r} stands)"


def _check_start(start: bytes, name: str) -> None:
    if start.startswith(_UTF16):
        raise DataError(f"{name} is UTF-16, as Excel's Unicode text is; expected UTF-8; save it as CSV UTF-8")
    if start.strip(b"\0") and any(len(start) > 3 and not any(start[first::2]) for first in (0, 1)):
        raise DataError(f"{name} is UTF-16 without a mark at its start; expected UTF-8; save it as CSV UTF-8")
    if format_of(name) in ("csv", "tsv") and _JSON_ROWS.match(start.removeprefix(_BYTE_ORDER_MARK)):
        raise DataError(f"{name} holds JSON; expected a table of text; name it .json, or .jsonl for one object a line")
    kind = file_kind(start)
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)
    if kind.startswith(_NO_TABLES) if is_text else kind != "a file of another kind":
        raise DataError(f"{name} is {kind}, not what its name says; expected a table of rows; get the file itself")
