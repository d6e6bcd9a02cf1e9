"""The log of a server: one line for each event, as JSON or for people, with the id of its request."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
import traceback
from collections import Counter as Counts
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, TextIO

_MAX_LINE = 300  # characters of a message, and of each line of a traceback: no picture or body fits
_MAX_LINES = 200  # of a traceback

_REPEATED_SECONDS = 60.0  # in which a warning or error is written once,
_TRACEBACKS = 20  # or, with its traceback, so often

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_request_fields: ContextVar[dict[str, Any] | None] = ContextVar("request_fields", default=None)


def begin_request(request_id: str) -> dict[str, Any]:
    """Give all log lines of this task, and of those it starts, the id of a request.

    Returns:
        A dictionary that `add_to_log` fills.
    """
    fields: dict[str, Any] = {}
    _request_id.set(request_id)
    _request_fields.set(fields)
    return fields


def add_to_log(**fields: int | float | str) -> None:
    """Add fields to the log line of this request, such as `items=3`.

    Never what the caller sent: numbers, and names that this server chose.
    """
    known = _request_fields.get()
    if known is not None:
        known.update(fields)


def chosen_format(log_format: str, stream: TextIO) -> str:
    """Return "text" or "json"; "auto" is text where a stream is a terminal, and JSON where a program may read it."""
    if log_format != "auto":
        return log_format
    return "text" if stream.isatty() else "json"


@contextlib.contextmanager
def logging_to_stderr(
    log_format: str, stream: TextIO | None = None, fields: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Send every log line and every warning of this process to stderr, until the end of the block.

    Messages of other libraries, the HTTP server's own included, come through here too, from level WARNING on.

    Args:
        log_format: "json" for one object a line, "text" for lines for people, "auto" as `chosen_format` says.
        stream: Another place than stderr.
        fields: What every line holds, such as which of several processes wrote it.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.addFilter(Repeated())
    if fields:
        handler.addFilter(partial(_add_fields, fields))
    handler.setFormatter(JsonFormatter() if chosen_format(log_format, stream) == "json" else TextFormatter())
    root, own = logging.getLogger(), logging.getLogger(__name__.partition(".")[0])
    before = root.handlers[:], root.level, own.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    own.setLevel(own.level or logging.INFO)  # whoever started this process may ask for more
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:], level, own_level = before
        root.setLevel(level)
        own.setLevel(own_level)


def _add_fields(fields: Mapping[str, Any], record: logging.LogRecord) -> bool:
    record.fields = {**getattr(record, "fields", {}), **fields}
    return True


class Repeated(logging.Filter):
    """Leave out warnings and errors that are repeated within a minute, so that no persistent error fills a disk.

    The first one of the next minute says in `repeated` how many were left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since = -math.inf
        self._counts: Counts[Hashable] = Counts()
        self._left_out: Counts[Hashable] = Counts()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to write a record."""
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._since >= _REPEATED_SECONDS:
            self._since = now
            self._counts.clear()
        raised = record.exc_info[1] if record.exc_info else None
        place = raised.__traceback__.tb_lineno if raised is not None and raised.__traceback__ else 0
        kind = (record.name, record.msg, type(raised), place)
        self._counts[kind] += 1
        if self._counts[kind] > (1 if raised is None else _TRACEBACKS):
            self._left_out[kind] += 1
            return False
        repeated = self._left_out.pop(kind, 0)
        if repeated:
            record.fields = {**getattr(record, "fields", {}), "repeated": repeated}
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        message, further = _message(record)
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **_fields(record),
            **({"exception": further} if further else {}),
        }
        return json.dumps(line, ensure_ascii=True, allow_nan=False, default=str)


class TextFormatter(logging.Formatter):
    """A line for people, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or lines."""
        message, further = _message(record)
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower()} {message}{fields}"
        return f"{line}\n{further}" if further else line


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the id of the request, and what `extra={"fields": {...}}` holds."""
    request_id = _request_id.get()
    return {**({"request_id": request_id} if request_id else {}), **getattr(record, "fields", {})}


def _message(record: logging.LogRecord) -> tuple[str, str]:
    """Return the first line of a message, and its further lines with the traceback, all of them cut to a bound."""
    first, *lines = record.getMessage().strip().splitlines() or [""]
    if record.exc_info and record.exc_info[1] is not None:
        lines += "".join(traceback.format_exception(record.exc_info[1])).splitlines()
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES // 2], "...", *lines[-_MAX_LINES // 2 :]]
    return _shortened(first), "\n".join(map(_shortened, lines))


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}... ({len(line):,} characters)"
