"""JSON with long strings cut out: the same as `json.loads` gives, or a refusal, in bounded work and memory."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.serving.http import json_bodies
from qwen_vl_classifier.serving.http.json_bodies import JsonLimits, parse_json
from qwen_vl_classifier.serving.http.problems import RefusedError

LIMITS = JsonLimits(items=64, text_chars=8_000, picture_chars=26_000_000)

PICTURE = base64.b64encode(bytes(range(256)) * 8_000).decode()  # 2.7 MB


def refusal(body: bytes, limits: JsonLimits = LIMITS) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse_json(body, limits)
    return caught.value


@pytest.mark.parametrize(
    "picture",
    [
        PICTURE,
        base64.encodebytes(bytes(500_000)).decode(),  # lines
        PICTURE.replace("+", " +"),
        'x"' * 700,
        "\\" * 5_000 + '"' + "\\" * 5_001,
        "\n\u1234" * 1_000,
        "\U0001f600" * 700,
        ",[{:" * 1_000,
        "",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("dumped", ["ascii", "utf-8", "indented", "slashes", "all escaped"])
def test_strings_of_every_spelling(picture: str, dumped: str) -> None:
    value = {
        "input": [{"image": picture, "text": "a,\\"}, {"text": picture[:8_000], "image": [picture, ""]}],
        "a": [1.5, 2],
    }
    body = json.dumps(value, ensure_ascii=dumped != "utf-8", indent=1 if dumped == "indented" else None)
    if dumped == "slashes":  # as PHP writes them
        body = body.replace("/", "\\/")
    if dumped == "all escaped":  # as .NET does with what HTML might take amiss
        body = body.replace("+", "\\u002B").replace("=", "\\u003d")
    assert parse_json(body.encode(), LIMITS) == value
    assert parse_json(bytearray(body.encode()), LIMITS) == value


LONG = "a" * 3_000


@pytest.mark.parametrize(
    "body",
    [
        f'{{"a": "{LONG}}}',
        f'{{"a": {LONG}"}}',
        f'{{"a": "{LONG}" "{LONG}"}}',
        f'{{"a": "b"{LONG}"c"}}',
        f'{{"a": \\"{LONG}"}}',
        f'{{"a": "{LONG}\\"}}',
        f'{{"a": "{LONG}\t"}}',
        f'{{"a": "{LONG}\\x"}}',
        f'{{"{LONG}": 1}}',
        f'\\"{{"a": "{LONG}"}}',
        f'{{"a": "{LONG}"}} \\',
        f'{{"a": "{LONG}\\ud83d\\q"}}',
        '{"a": ' + "1" * 5_000 + "}",
        '{"a": ' + "1" * 21 + "}",
    ],
    ids=range(14),
)
def test_what_is_no_json(body: str) -> None:
    assert (refusal(body.encode()).status, refusal(body.encode()).code) == (400, "invalid_json")


def test_bytes_that_are_no_utf_8() -> None:
    assert refusal(b'{"a": "' + b"a" * 3_000 + b'\xff"}').code == "invalid_json"


@settings(max_examples=100)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20)
        | st.text('aaaaaaab"\\\u1234', min_size=30),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\', max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
    st.booleans(),
    st.data(),
)
def test_the_same_as_json(value: Any, ascii: bool, data: st.DataObject) -> None:
    """Also where a byte was changed: the same value, or no value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bodies, "_LONG", 24)
        patch.setattr(json_bodies, "_PIECE", 48)
        body = json.dumps(value, ensure_ascii=ascii).encode()
        assert parsed(body) in (value, "body_too_complex")
        place = data.draw(st.integers(0, len(body) - 1))
        other = body[:place] + data.draw(st.sampled_from([b'"', b"\\", b"a", b",", b""])) + body[place + 1 :]
        try:
            expected = json.loads(other.decode())
        except ValueError:
            expected = "invalid_json"
        assert parsed(other) in (expected, "invalid_json", "body_too_complex")


def parsed(body: bytes) -> Any:
    """Return the value, or why there is none."""
    try:
        return parse_json(body, LIMITS)
    except RefusedError as error:
        return error.code


class TestBounds:
    def test_a_string_longer_than_any_that_is_used_is_not_read_to_its_end(self) -> None:
        limits = JsonLimits(items=1, text_chars=10, picture_chars=400_000)
        body = b'{"a": "' + b"a" * 3_000_000 + b'", "b": "' + b"\\n" * 1_000 + "\u1234".encode() * 1_000_000 + b'"}'
        found = parse_json(body, limits)
        assert len(found["a"]) == 400_001
        assert len(found["b"]) == 4_097, "text outside of ASCII, of which a path is the longest"

    @pytest.mark.parametrize(
        "body",
        [
            b'{"input": [' + b"[]," * 400_000 + b"0]}",
            b'{"input": [' + b'"",' * 2_000_000 + b"0]}",
            b'{"input": [' + b'"a",' * 500_000 + b"0]}",
            b'{"a": ' + b" " * 10_000_000 + b"1}",
            b'{"a": ' + b"[1.5]," * 1_000_000 + b"1}",
            b'{"a": "' + b"\\n" * 5_000_000 + b'"}',
        ],
        ids=range(6),
    )
    def test_more_parts_than_any_request_has(self, body: bytes) -> None:
        tracemalloc.start()
        try:
            assert refusal(body).code == "body_too_complex"
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 12_000_000

    def test_many_fields(self) -> None:
        body = json.dumps({"input": [], **{f"k{number}": 1 for number in range(20_000)}}).encode()
        error = refusal(body)
        assert (error.status, error.code) == (400, "invalid_request")
        assert "more than 16 fields" in error.detail

    def test_memory_is_that_of_the_body(self) -> None:
        """While it is read: the body, a string, and the pieces of which that is made."""
        body = json.dumps({"input": [{"image": PICTURE * 4, "text": "a"}]}).encode()
        tracemalloc.start()
        try:
            found = parse_json(body, LIMITS)
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(found["input"][0]["image"]) == 4 * len(PICTURE)
        assert held < 1.1 * len(body)
        assert peak < 2.2 * len(body)
