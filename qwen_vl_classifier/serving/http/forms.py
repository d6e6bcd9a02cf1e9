"""Multipart forms: a body that was read within its limits -> its parts, none of them on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from qwen_vl_classifier.extras import require
from qwen_vl_classifier.serving.http.problems import RefusedError

require("python_multipart", extra="serve")  # before it is imported, so that a missing extra is named

from python_multipart import FormParser  # noqa: E402
from python_multipart.exceptions import FormParserError  # noqa: E402
from python_multipart.multipart import Field, File, parse_options_header  # noqa: E402

MAX_PARTS = 64
"""Most parts of one form: pictures, a text, and names of models."""

_PIECE = 1_048_576  # bytes of a body that are copied and parsed at once

# The answer says what is wrong; the parser's log lines would repeat what callers sent.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


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
        RefusedError: 400, it is not such a form; 413, it has too many parts.
    """
    parts: list[Part] = []

    def add(field: Field | File) -> None:
        if len(parts) >= MAX_PARTS:
            raise RefusedError(413, "too_many_parts", f"the form has more than {MAX_PARTS} parts; send fewer")
        if isinstance(field, File):
            field.file_object.seek(0)
            data = field.file_object.read()
        else:
            data = field.value or b""
        parts.append(Part((field.field_name or b"").decode(errors="replace"), isinstance(field, File), data))

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    complete = bool(boundary) and bytes(body[-1024:]).rstrip(b"\r\n \t").endswith(b"--%s--" % boundary)
    try:
        parser = FormParser(
            "multipart/form-data",
            add,
            add,
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body), "MAX_FIELD_SIZE": len(body), "MAX_FIELDS": MAX_PARTS + 1},
        )
        for start in range(0, len(body), _PIECE):
            parser.write(bytes(body[start : start + _PIECE]))
        parser.finalize()
    except FormParserError:
        complete = False
    if not complete:
        raise RefusedError(400, "invalid_form", "the body is not a complete multipart/form-data form; send it again")
    return parts
