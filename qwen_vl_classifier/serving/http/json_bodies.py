"""Parse JSON bodies in small steps, within the memory that was counted for the body.

`json.loads` lets no other thread run until it is done, and a body may have tens of megabytes. Nearly all of an honest
one are pictures, which stand there as long strings. So long strings are cut out and read piece by piece; what is left
must be as short as texts and structure of the largest request, and holds numbers of our own in their places.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.serving.http.problems import RefusedError

_LONG = 1_024  # bytes between two quotation marks from which they may be a string to cut out
_PIECE = 262_144  # bytes of a string that are read at once
_LONGEST_ESCAPE = 12  # bytes: two halves of a surrogate pair
_LONGEST_PATH = 4_096  # characters; of strings, only texts and paths hold others than those of ASCII
_MARKS = 150_000  # commas, colons and opening brackets, those in short texts included
_MARKS_PER_ITEM = 1_000  # more of them; no honest request comes near it
_MOST_DIGITS = 20  # of an integer, since converting one takes as long as the square of their number


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """The largest JSON to read.

    Attributes:
        items: Most examples.
        text_chars: Longest text of one of them.
        picture_chars: Longest string that can hold a picture.
        fields: Most fields of one object.
    """

    items: int
    text_chars: int
    picture_chars: int
    fields: int = 16


def parse_json(body: bytes | bytearray, limits: JsonLimits) -> Any:
    """Parse strict JSON: in UTF-8, without names given twice and without numbers that JSON does not know.

    A string that is longer than any that a request can use comes back cut short, but still longer than those.

    Raises:
        RefusedError: 400, it is not such JSON, or an object has too many fields; 413, it has more parts than any
            request needs.
    """
    strings: list[str] = []
    mark = str(secrets.randbits(64) | 1 << 64)  # begins the number in the place of a string; no caller can know it

    def number(digits: str) -> float | str:
        whole, _, place = digits.partition(".")
        return strings[int(place)] if whole == mark else float(digits)

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _object(pairs, limits.fields)

    try:
        rest = _without_long_strings(body, limits, mark, strings)
        return json.loads(
            rest.decode(),
            object_pairs_hook=fields,
            parse_constant=_refuse_constant,
            parse_float=number,
            parse_int=_integer,
        )
    except _TwiceError:
        detail = "an object in the body has the same name twice; give it once"
        raise RefusedError(400, "invalid_json", detail) from None
    except (ValueError, RecursionError):
        raise RefusedError(400, "invalid_json", "the body is not JSON in UTF-8; expected a JSON object") from None


def _without_long_strings(body: bytes | bytearray, limits: JsonLimits, mark: str, strings: list[str]) -> bytearray:
    """Return a body with numbers in the place of its long strings, which are added to `strings`.

    Where a string begins is known by counting the quotation marks before it. If the body is not JSON, the count may be
    wrong; but then what is wrong with it stands before the first string that is cut out wrongly, and is returned too.
    """
    most = limits.items * (6 * limits.text_chars + _LONG)  # a character takes up to six bytes: \uABCD
    rest = bytearray()
    start = 0  # behind a quotation mark, or the beginning
    inside = begins = False  # whether a string goes on there; whether it has only just begun
    while start < len(body):
        last = body.rfind(b'"', start, start + _LONG)
        if last < 0:
            last = body.find(b'"', start + _LONG)
            if begins and last >= 0 and not body[max(start, last - _LONGEST_ESCAPE) : last].endswith(b"\\"):
                rest[-1:] = f"{mark}.{len(strings)}".encode()
                strings.append(_read_string(body, start, last, limits))
                start, inside, begins = last + 1, False, False
                continue
        stop = last + 1 if last >= 0 else len(body)
        if len(rest) + stop - start > most:
            raise _too_complex()
        part = bytes(body[start:stop])
        rest += part
        start = stop
        part = part.replace(b"\\\\", b"")  # what is left of backslashes stands before what it escapes
        inside ^= (part.count(b'"') - part.count(b'\\"')) % 2 == 1
        begins = inside and not part.endswith(b'\\"')
    if sum(map(rest.count, (b",", b":", b"[", b"{"))) > _MARKS + limits.items * _MARKS_PER_ITEM:
        # A small body can hold millions of empty lists, each of which takes up a hundred times its bytes.
        raise _too_complex()
    return rest


def _read_string(body: bytes | bytearray, start: int, end: int, limits: JsonLimits) -> str:
    """Return the string that stands between two places of a body, without reading on when it is too long."""
    pieces = []
    length, most = 0, max(limits.text_chars, limits.picture_chars)
    while start < end and length <= most:
        stop = _end_of_piece(body, start, end)
        piece: str = json.loads(f'"{body[start:stop].decode()}"')
        pieces.append(piece)
        length += len(piece)
        if not piece.isascii():  # it is no picture, and takes up to four times the memory
            most = max(limits.text_chars, _LONGEST_PATH)
        start = stop
    return "".join(pieces)[: most + 1]


def _end_of_piece(body: bytes | bytearray, start: int, end: int) -> int:
    """Return a place up to which a string may be read by itself: not within an escape or a character."""
    stop = start + _PIECE
    if stop >= end:
        return end
    for place in range(stop, stop - _LONG, -1):
        if body[place] & 0xC0 != 0x80 and b"\\" not in body[place - _LONGEST_ESCAPE : place]:
            return place
    raise _too_complex()  # nothing but escapes: no picture, and longer than any text


def _too_complex() -> RefusedError:
    return RefusedError(413, "body_too_complex", "the body has more parts than any request needs; send fewer items")


class _TwiceError(Exception):
    """A name stands twice in one object, and readers differ about which counts."""


def _object(pairs: list[tuple[str, Any]], most: int) -> dict[str, Any]:
    if len(pairs) > most:
        detail = f"an object has more than {most} fields; leave out unknown ones"
        raise RefusedError(400, "invalid_request", detail)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError
    return int(digits)


def _refuse_constant(_: str) -> Any:
    raise ValueError
