"""Lines that programs read, and that hold nothing of what callers sent."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from qwen_vl_classifier.serving.logs import JsonFormatter, begin_request, current_request_id, logging_to_stderr, note

LOG = logging.getLogger("qwen_vl_classifier.serving.anything")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    with logging_to_stderr("json", stream := io.StringIO()):
        yield stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line(stream: io.StringIO) -> None:
    LOG.info("loaded %d of\n%s", 2, "three", extra={"fields": {"seconds": 0.5}})
    (line,) = lines(stream)
    assert str(line.pop("time")).endswith("Z")
    assert line == {
        "level": "info",
        "logger": LOG.name,
        "message": "loaded 2 of",
        "exception": "three",
        "seconds": 0.5,
    }


def test_an_error_has_its_traceback_in_one_line(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("first\nsecond" + "x" * 10_000_000)
    except RuntimeError:
        LOG.exception("a request failed")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert len(text) < 5_000, "a body would fit in"
    (line,) = lines(stream)
    assert "test_logs.py" in str(line["exception"])
    assert "RuntimeError: first" in str(line["exception"])


def test_a_long_traceback_keeps_both_ends(stream: io.StringIO) -> None:
    LOG.error("failed", exc_info=RuntimeError("\n".join(f"line {number}" for number in range(100_000))))
    (line,) = lines(stream)
    assert "line 3\n" in str(line["exception"])
    assert "line 99999" in str(line["exception"])
    assert len(str(line["exception"])) < 10_000


def test_what_json_cannot_hold_is_still_a_line() -> None:
    # By the formatter alone: what is logged stands in pytest's own report too, which must be text that can be sent.
    record = LOG.makeRecord(
        *(LOG.name, logging.INFO, __file__, 1, "odd \ud800 \x00 \u2028 text", (), None),
        extra={"fields": {"object": object(), "path": "\ud800"}},
    )
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["path"] == "\ud800"


def test_other_libraries_and_warnings_come_through_it(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("httpx").info("GET https://example.org/picture?secret")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert [line["logger"] for line in lines(stream)] == ["uvicorn.error", "py.warnings"]


def test_everything_is_as_before_after_it() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("qwen_vl_classifier").level
    with logging_to_stderr("text", io.StringIO()):
        assert root.handlers != before[0]
    assert (root.handlers[:], root.level, logging.getLogger("qwen_vl_classifier").level) == before


def test_stderr_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("json"):
        LOG.info("here")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["message"] == "here"
    assert sys.stderr is not None


def test_lines_for_people() -> None:
    with logging_to_stderr("text", stream := io.StringIO()):
        LOG.error("failed", exc_info=RuntimeError("why"), extra={"fields": {"items": 3}})
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith(" error failed items=3")
    assert rest[-1] == "RuntimeError: why"


def test_lines_of_requests_carry_their_ids(stream: io.StringIO) -> None:
    """Those of tasks and threads that a request starts too, and never another's."""

    async def request(number: int) -> dict[str, object]:
        noted = begin_request(f"id-{number}")
        await asyncio.sleep(0)
        note(items=number)
        await asyncio.create_task(part(number))
        await asyncio.to_thread(LOG.info, "%d", number)
        return noted

    async def part(number: int) -> None:
        assert current_request_id() == f"id-{number}"
        note(models=2)
        LOG.info("%d", number)

    async def main() -> list[dict[str, object]]:
        return await asyncio.gather(*(request(number) for number in range(20)))

    noted = asyncio.run(main())
    LOG.info("outside")
    assert noted == [{"items": number, "models": 2} for number in range(20)]
    *within, outside = lines(stream)
    assert len(within) == 40
    assert all(line["request_id"] == f"id-{line['message']}" for line in within)
    assert "request_id" not in outside


def test_a_note_outside_of_requests_is_nothing() -> None:
    contextvars.Context().run(note, items=1)
    assert contextvars.Context().run(current_request_id) == ""
