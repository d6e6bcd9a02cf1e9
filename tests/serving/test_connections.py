"""What connections do about clients that are hard to imitate; `test_server` has the others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from qwen_vl_classifier.serving import connections
from qwen_vl_classifier.serving.connections import Connection, Limits
from tests.serving.clock import FOREVER
from tests.waiting import run


class Transport:
    """A transport with bytes to send, of which its client takes some whenever somebody looks."""

    def __init__(self, *unsent: int) -> None:
        self._unsent: Iterator[int] = iter(unsent)
        self.aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        return next(self._unsent)

    def get_extra_info(self, _name: str) -> Any:
        return None

    def is_closing(self) -> bool:
        return self.aborted.is_set()

    def abort(self) -> None:
        self.aborted.set()

    def left(self) -> list[int]:
        return list(self._unsent)


@pytest.mark.parametrize(
    ("unsent", "refused"),
    [
        ((500_000, 300_000, 100_000, 0), []),
        ((500_000, 300_000, 299_999), ["slow_reader"]),
        ((500_000, 500_000), ["slow_reader"]),
    ],
)
def test_one_who_reads_slowly_is_not_one_who_does_not(
    unsent: tuple[int, ...], refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_SECONDS_OF_STALL", 0.01)
    seen: list[str] = []

    async def main() -> None:
        async def app(_scope: Any, _receive: Any, _send: Any) -> None: ...

        limits = Limits(header_seconds=FOREVER, body_seconds=FOREVER, connections=10, refused=seen.append)
        config = uvicorn.Config(app, log_config=None, ws="none")
        connection = Connection(config, ServerState(), {}, limits=limits)
        transport = Transport(*unsent)
        connection.connection_made(transport)  # type: ignore[arg-type]
        connection.pause_writing()
        await transport.aborted.wait()
        connection.connection_lost(OSError())
        assert transport.left() == []

    run(main())
    assert seen == refused
