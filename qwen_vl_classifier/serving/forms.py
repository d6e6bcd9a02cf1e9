"""Forms with files: a body that was read within its limits -> its parts, none of them on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from qwen_vl_classifier.extras import require
from qwen_vl_classifier.serving.problems import RefusedError

require("python_multipart", extra="serve")  # before it is imported, so that a missing extra is named

from python_multipart.exceptions import FormParserError  # noqa: E402
from python_multipart.multipart import MultipartParser, parse_options_header  # noqa: E402

MAX_PARTS = 64
"""Most parts of one form: pictures, a text, and names of models."""

_MAX_HEADERS = 8  # of one part
_MAX_HEADER_BYTES = 4096

_silent = logging.Logger("forms", level=logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form.

    Attributes:
        name: Which field it belongs to.
        is_file: Whether it was sent as a file. What the file was called is not kept.
        data: Its content.
    """

    name: str
    is_file: bool
    data: bytes


def parse_form(body: bytes | bytearray, content_type: str) -> list[Part]:
    """Split a multipart form (RFC 7578) into its parts.

    Args:
        body: The whole body.
        content_type: The header, which names the boundary.

    Raises:
        RefusedError: 400, it is no such form; 413, it has too many parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _malformed("Content-Type names no boundary")
    reader = _Reader()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin_part,
                "on_part_data": reader.add_data,
                "on_part_end": reader.end_part,
                "on_header_field": reader.add_name,
                "on_header_value": reader.add_value,
                "on_header_end": reader.end_header,
                "on_end": reader.end,
            },
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER_BYTES,
        )
        parser.logger = _silent  # the answer says what is wrong; lines that callers can cause at will help nobody
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError:
        raise _malformed("its parts cannot be told apart") from None
    if not reader.complete:
        raise _malformed("it ends before its last boundary")
    return reader.parts


class _Reader:
    """Takes in what the parser finds."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.complete = False
        self._name = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._data = bytearray()

    def begin_part(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise RefusedError(413, "too_many_parts", f"the form has more than {MAX_PARTS} parts; send fewer")
        self._disposition = b""
        self._data = bytearray()

    def add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def end_part(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no name")
        name = options[b"name"].decode(errors="replace")
        self.parts.append(Part(name, is_file=b"filename" in options, data=bytes(self._data)))

    def end(self) -> None:
        self.complete = True


def _malformed(why: str) -> RefusedError:
    return RefusedError(400, "invalid_form", f"the body is no form of multipart/form-data: {why}")
