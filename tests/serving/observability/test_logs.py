"""The log has one line for each event, whatever is logged, and nothing that callers sent."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator

import pytest

from qwen_vl_classifier.serving.observability.logs import (
    JsonFormatter,
    add_to_log,
    begin_request,
    logging_to_stderr,
)
from tests.serving.observability.reading import lines_of

LOG = logging.getLogger("qwen_vl_classifier.serving.anything")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    with logging_to_stderr("json", stream := io.StringIO()):
        yield stream


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestLogging:
    @pytest.mark.parametrize(
        ("log_format", "stream", "is_json"),
        [
            ("auto", Terminal(), False),
            ("auto", io.StringIO(), True),
            ("json", Terminal(), True),
            ("text", io.StringIO(), False),
        ],
    )
    def test_text_for_people_and_json_for_programs(self, log_format: str, stream: io.StringIO, is_json: bool) -> None:
        with logging_to_stderr(log_format, stream):
            LOG.info("ready")
        assert stream.getvalue().startswith("{") == is_json
        assert stream.getvalue().endswith("ready\n") != is_json

    def test_a_line(self, stream: io.StringIO) -> None:
        LOG.info("loaded %d of\n%s", 2, "three", extra={"fields": {"seconds": 0.5}})
        (line,) = lines_of(stream)
        assert str(line.pop("time")).endswith("Z")
        assert line == {
            "level": "info",
            "logger": LOG.name,
            "message": "loaded 2 of",
            "exception": "three",
            "seconds": 0.5,
        }

    def test_an_error_has_its_traceback_in_one_line(self, stream: io.StringIO) -> None:
        try:
            raise RuntimeError("first\nsecond" + "x" * 10_000_000)
        except RuntimeError:
            LOG.exception("a request failed")
        assert stream.getvalue().count("\n") == 1
        assert len(stream.getvalue()) < 5_000, "a body would fit in"
        (line,) = lines_of(stream)
        assert "test_logs.py" in line["exception"]
        assert "RuntimeError: first" in line["exception"]

    def test_a_long_traceback_keeps_both_ends(self, stream: io.StringIO) -> None:
        LOG.error("failed", exc_info=RuntimeError("\n".join(f"line {number}" for number in range(100_000))))
        (line,) = lines_of(stream)
        assert "line 3\n" in line["exception"]
        assert "line 99999" in line["exception"]
        assert len(line["exception"]) < 10_000

    def test_what_json_cannot_hold_is_still_a_line(self) -> None:
        # By the formatter alone: what is logged stands in pytest's own report too, which must be text that can be sent.
        record = LOG.makeRecord(
            *(LOG.name, logging.INFO, __file__, 1, "odd \ud800 \x00 \u2028 text", (), None),
            extra={"fields": {"object": object(), "path": "\ud800"}},
        )
        line = JsonFormatter().format(record)
        assert line.isascii()
        assert len(line.splitlines()) == 1
        assert json.loads(line)["path"] == "\ud800"

    def test_other_libraries_and_warnings_come_through_it(self, stream: io.StringIO) -> None:
        logging.getLogger("uvicorn.error").error("Exception in ASGI application")
        logging.getLogger("httpx").info("GET https://example.org/picture?secret")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        assert [line["logger"] for line in lines_of(stream)] == ["uvicorn.error", "py.warnings"]

    def test_everything_is_as_before_after_it(self) -> None:
        root = logging.getLogger()
        before = root.handlers[:], root.level, logging.getLogger("qwen_vl_classifier").level
        with logging_to_stderr("text", io.StringIO()):
            assert root.handlers != before[0]
        assert (root.handlers[:], root.level, logging.getLogger("qwen_vl_classifier").level) == before

    def test_stderr_is_the_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        with logging_to_stderr("json"):
            LOG.info("here")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert json.loads(captured.err)["message"] == "here"

    def test_lines_for_people(self) -> None:
        with logging_to_stderr("text", stream := io.StringIO()):
            LOG.error("failed", exc_info=RuntimeError("why"), extra={"fields": {"items": 3}})
        first, *rest = stream.getvalue().splitlines()
        assert first.endswith(" error failed items=3")
        assert rest[-1] == "RuntimeError: why"

    def test_lines_of_requests_carry_their_ids(self, stream: io.StringIO) -> None:
        """Those of tasks and threads that a request starts too, and never another's."""

        async def request(number: int) -> dict[str, object]:
            fields = begin_request(f"id-{number}")
            await asyncio.sleep(0)
            add_to_log(items=number)
            await asyncio.create_task(part(number))
            await asyncio.to_thread(LOG.info, "%d", number)
            return fields

        async def part(number: int) -> None:
            add_to_log(models=2)
            LOG.info("%d", number)

        async def main() -> list[dict[str, object]]:
            return await asyncio.gather(*(request(number) for number in range(20)))

        fields = asyncio.run(main())
        LOG.info("outside")
        assert fields == [{"items": number, "models": 2} for number in range(20)]
        *within, outside = lines_of(stream)
        assert len(within) == 40
        assert all(line["request_id"] == f"id-{line['message']}" for line in within)
        assert "request_id" not in outside

    def test_fields_outside_of_requests_are_ignored(self) -> None:
        contextvars.Context().run(add_to_log, items=1)


class TestRepeated:
    """A fault that comes again and again is one line a minute."""

    def test_a_warning_is_written_once_a_minute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        log = logging.getLogger("qwen_vl_classifier.serving")
        with logging_to_stderr("json", stream := io.StringIO()):
            for number in range(1_000):
                log.warning("no connection could be accepted: %s", number)
                log.error("another one")
                log.info("a request")
            now = 61.0
            log.warning("no connection could be accepted: %s", "again")
            log.warning("no connection could be accepted: %s", "again")
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert sum(line["level"] == "info" for line in lines) == 1_000
        first, other, again = (line for line in lines if line["level"] != "info")
        assert (first["message"], other["message"]) == ("no connection could be accepted: 0", "another one")
        assert again["message"] == "no connection could be accepted: again"
        assert again["repeated"] == 999

    def test_tracebacks_of_different_defects_do_not_hide_each_other(self) -> None:
        log = logging.getLogger("qwen_vl_classifier.serving")
        with logging_to_stderr("json", stream := io.StringIO()):
            for _ in range(100):
                try:
                    raise LookupError
                except LookupError:
                    log.exception("a request failed")
            try:
                raise ArithmeticError
            except ArithmeticError:
                log.exception("a request failed")
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert sum("LookupError" in line["exception"] for line in lines) == 20
        assert sum("ArithmeticError" in line["exception"] for line in lines) == 1
