"""The log of a server: one line for each event on stderr, as JSON or for people.

A line about a request carries its id. No line carries what a caller sent: no text, picture, key, path or query. A
traceback stands in the log and nowhere else, each of its lines cut to a length at which no picture or body fits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

_LONGEST_LINE = 300  # characters of a message, and of each line of a traceback
_MOST_LINES = 200  # of a traceback

_request: ContextVar[Mapping[str, Any] | None] = ContextVar("request", default=None)
_noted: ContextVar[dict[str, Any] | None] = ContextVar("noted", default=None)


def begin_request(request_id: str) -> dict[str, Any]:
    """Give all log lines of this task, and of those it starts, the id of a request.

    Returns:
        A dictionary that `note` fills.
    """
    _request.set({"request_id": request_id})
    noted: dict[str, Any] = {}
    _noted.set(noted)
    return noted


def current_request_id() -> str:
    """Return the id of the request that this task works for, or nothing."""
    request = _request.get()
    return str(request["request_id"]) if request else ""


def note(**fields: int | float | str) -> None:
    """Add fields to the line that the log will have of this request, such as `items=3`.

    Never what the caller sent: numbers, and names that this server chose.
    """
    noted = _noted.get()
    if noted is not None:
        noted.update(fields)


@contextlib.contextmanager
def logging_to_stderr(log_format: str, stream: TextIO | None = None) -> Iterator[None]:
    """Send every log line and every warning of this process to stderr, until the end of the block.

    Messages of other libraries, the HTTP server's own included, come through here too, from level WARNING on.

    Args:
        log_format: "json" for one object a line, "text" for lines for people.
        stream: Another place than stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root, own = logging.getLogger(), logging.getLogger(__name__.partition(".")[0])
    before = root.handlers[:], root.level, own.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:], level, own_level = before
        root.setLevel(level)
        own.setLevel(own_level)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if more := _more(record):
            line["exception"] = more
        return json.dumps(line, ensure_ascii=True, allow_nan=False, default=str)


class TextFormatter(logging.Formatter):
    """A line for people, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or lines."""
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower()} {_message(record)}{fields}"
        if more := _more(record):
            line += "\n" + more
        return line


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    return _short(record.getMessage().strip().partition("\n")[0])


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what `extra={"fields": {...}}` holds, and the id of the request."""
    return {**(_request.get() or {}), **getattr(record, "fields", {})}


def _more(record: logging.LogRecord) -> str:
    """Return what is longer than a line: further lines of the message, some of which are tracebacks, and the error."""
    lines = record.getMessage().strip().splitlines()[1:]
    if record.exc_info and record.exc_info[1] is not None:
        lines += "".join(traceback.format_exception(record.exc_info[1])).splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES // 2], "...", *lines[-_MOST_LINES // 2 :]]
    return "\n".join(map(_short, lines))


def _short(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}... ({len(line):,} characters)"
