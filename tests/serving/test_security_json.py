"""JSON that means harm: it is refused in one line, soon, and without taking up much memory."""

from __future__ import annotations

import tracemalloc

import pytest

from tests.serving.client import check_problem
from tests.serving.served import Served

PATHS = ("/v1/classify", "/v1/moderations", "/v1/explain", "/v1/systemone")

ITEM = b'{"text": "a"}'


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"{",
        b"{}{}",
        b"{'a': 1}",
        b'{"a": 1,}',
        b"// comment\n{}",
        b"\xff\xfe\xfd",
        b"\xef\xbb\xbf{}",
        '{"text": "a"}'.encode("utf-16"),
        '{"text": "a"}'.encode("utf-32"),
        b'{"text": "\xe9"}',
        b'{"text": "\xed\xa0\x80"}',  # a surrogate half as UTF-8 would spell it, if it could
        b'{"text": "a\x00b"}',
        b'{"text": "a\nb"}',
        b'{"text": NaN}',
        b'{"text": Infinity}',
        b'{"text": -Infinity}',
        b'{"text": ' + b"1" * 100_000 + b"}",
        b'{"text": 1e' + b"9" * 5_000 + b"}" * 2,
        b"[" * 100_000,
        b"[" * 1_500 + b"]" * 1_500,
        b'{"a":' * 5_000,
        b'{"text": "a", "text": "b"}',
        b'{"input": [{"text": "a", "text": "b"}]}',
        b'{"model": "first", "model": "second", "input": [' + ITEM + b"]}",
    ],
    ids=range(26),
)
def test_what_is_no_json_is_400(served: Served, path: str, content: bytes) -> None:
    response = served.client.post(path, content=content)
    if content.startswith(b"[" * 1_500 + b"]"):  # JSON, though nobody's idea of a request
        assert check_problem(response, response.status_code, response.json()["error"]["code"])
        assert response.status_code == 400 or path == "/v1/systemone"
    else:
        check_problem(response, 400, "invalid_json")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"true",
        b"0",
        b"-0.0",
        b"1e999",
        b'"text"',
        b"[]",
        b"{}",
        b'{"__proto__": {}}',
        b'{"": 1}',
        b'{"\\ud800": 1}',
        b'{"model": {"$ref": "#"}}',
        b'{"model": "first", "input": 1e999, "text": 1e999}',
        b'{"model": "first", "input": "\\ud800", "text": "\\udfff"}',
        b'{"model": "\\u0000"}',
    ],
)
def test_what_is_no_request_is_refused(served: Served, path: str, content: bytes) -> None:
    response = served.client.post(path, content=content)
    status = 422 if path == "/v1/systemone" else 400
    assert check_problem(response, status, response.json()["error"]["code"])
    assert "$ref" not in response.text
    assert "proto" not in response.text


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"[[]],", b'{"a":[]},', b'"",', b"0,"])
def test_a_small_body_may_not_become_a_large_one_in_memory(served: Served, unit: bytes) -> None:
    content = b'{"model": "first", "input": [' + unit * (12_000_000 // len(unit)) + b"0]}"
    tracemalloc.start()
    try:
        response = served.client.post("/v1/classify", content=content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    check_problem(response, 413, "body_too_complex")
    assert peak < 6 * len(content), "the body, and copies of it on its way"


def test_a_long_text_of_commas_is_no_such_body(served: Served) -> None:
    text = "," * (served.config.max_text_chars + 1)
    response = served.post("/v1/moderations", {"model": "first", "input": [text] * served.config.max_items})
    check_problem(response, 413, "text_too_large")  # read, and refused for what it is
