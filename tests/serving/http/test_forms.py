"""Multipart forms, well-formed and hostile."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.serving.http.forms import MAX_PARTS, Part, parse_form
from qwen_vl_classifier.serving.http.problems import RefusedError

TYPE = "multipart/form-data; boundary=edge"


def refusal(body: bytes, content_type: str = TYPE) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse_form(body, content_type)
    return caught.value


def part(head: bytes, data: bytes = b"x") -> bytes:
    return b"--edge\r\n" + head + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--edge--\r\n"


NAMED = b'Content-Disposition: form-data; name="text"'


def test_what_a_client_sends() -> None:
    binary = bytes(range(256)) * 20 + b"\r\n--edg\r\n"
    request = httpx.Request(
        "POST",
        "http://localhost",
        files=[("image", ("../../etc/passwd", binary, "image/png")), ("image", (None, b"data:,"))],
        data={"text": "\u4f60\u597d\r\nline", "model": ["a", "b"]},
    )
    parts = parse_form(request.read(), request.headers["content-type"])
    assert sorted(parts, key=lambda part: part.name) == [
        Part("image", True, binary),
        Part("image", False, b"data:,"),
        Part("model", False, b"a"),
        Part("model", False, b"b"),
        Part("text", False, "\u4f60\u597d\r\nline".encode()),
    ]


def test_empty_parts_and_quoted_names() -> None:
    body = form(part(NAMED, b""), part(b'content-disposition: FORM-DATA; name="a\\"b"; filename=""', b"\r\n"))
    assert parse_form(body, 'multipart/form-data; boundary="edge"') == [
        Part("text", False, b""),
        Part('a"b', True, b"\r\n"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"--edge",
        b"--edge\r\n",
        part(NAMED),  # no last boundary
        form(part(NAMED))[:-4],
        form(part(b"Content-Type: text/plain")),
        form(part(b"Content-Disposition: form-data")),
        form(part(NAMED + b"\r\nX: " + b"x" * 5000)),
        form(part(NAMED + b"\r\nX: x" * 9)),
        form(part(b"\x00: \x00")),
        form(part(b"no colon")),
        b"--other\r\n" + NAMED + b"\r\n\r\nx\r\n--other--",
    ],
)
def test_what_is_no_form_is_400(body: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    error = refusal(body)
    assert (error.status, error.code) == (400, "invalid_form")
    assert capfd.readouterr() == ("", ""), "callers could fill the log"


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=", "", "; ;"])
def test_a_boundary_is_needed(content_type: str) -> None:
    assert refusal(form(part(NAMED)), content_type).status == 400


def test_a_boundary_is_no_longer_than_it_may_be() -> None:
    assert refusal(b"", "multipart/form-data; boundary=" + "x" * 1000).status == 400


def test_parts_are_counted() -> None:
    assert len(parse_form(form(*[part(NAMED)] * MAX_PARTS), TYPE)) == MAX_PARTS
    error = refusal(form(*[part(NAMED)] * (MAX_PARTS + 1)))
    assert (error.status, error.code) == (413, "too_many_parts")


@settings(max_examples=200)
@given(st.lists(st.sampled_from([b"--edge", b"\r\n", b"--", NAMED, b"\r\n\r\n", b"x", b":", b";", b"\x00", b"="])))
@example([b"--edge", b"\r\n", NAMED, b"\r\n\r\n", b"x", b"\r\n", b"--edge", b"--"])
def test_any_bytes_are_parts_or_a_refusal(pieces: list[bytes]) -> None:
    try:
        parts = parse_form(b"".join(pieces), TYPE)
    except RefusedError as caught:
        parts, status = [], caught.status
    else:
        status = 200
    assert status in (200, 400)
    assert all(part.name for part in parts)
