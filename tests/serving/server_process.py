"""Servers as processes of their own: started on a port that the system chose, watched, and always ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import LIMIT, until

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ServerProcess:
    """A server that listens.

    Attributes:
        process: Its process.
        url: Its address.
        log: The file that takes its stderr.
    """

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=LIMIT, trust_env=False, **options)

    def metric(self, name: str) -> float:
        """Return one sample of /metrics by its name and labels; 0 if there is none."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").text.splitlines() if line[0] != "#")
        return float(lines.get(name, 0))

    def until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.get("/readyz").status_code == 200

        until(ready, "a server that is ready")

    def until_refused(self) -> None:
        """Return when nobody listens any more: the signal has arrived."""

        def refused() -> bool:
            try:
                socket.create_connection(self.address, timeout=LIMIT).close()
            except ConnectionError:
                return True
            return False

        until(refused, "a server that listens no more")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self) -> int:
        """Wait for its end and return its status."""
        return self.process.wait(LIMIT)

    def lines(self) -> list[dict[str, Any]]:
        """Return its log, which must be JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextlib.contextmanager
def running(log: Path, *command: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start a server; give it once it listens.

    Args:
        log: A file for its stderr; a pipe that nobody reads would stop it.
        command: Arguments of Python.
        environment: Further variables.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
        )
    watchdog = threading.Timer(LIMIT, process.kill)  # of the start alone: all later waits have a limit
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        assert " at http" in line, log.read_text()
        yield ServerProcess(process, line.split()[-1], log)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


async def conversation(
    server: ServerProcess,
    begin: bytes,
    drops: bytes = b"",
    *,
    before: int = 0,
    every: float = 0.05,
    begun: Callable[[], None] = lambda: None,
) -> bytes:
    """Send something, then byte after byte, until the server closes; return all that it said.

    Args:
        server: Whom to talk to.
        begin: What to send at once.
        drops: What to send slowly, again and again.
        before: How many answers without a body to wait for before the slow part.
        every: Seconds between two bytes.
        begun: Is called as soon as `begin` is sent.
    """
    reader, writer = await asyncio.open_connection(*server.address)
    said = bytearray()

    async def listen() -> None:
        while chunk := await reader.read(65_536):
            said.extend(chunk)

    try:
        async with asyncio.timeout(LIMIT):
            writer.write(begin)
            await writer.drain()
            begun()
            for _ in range(before):
                said += await reader.readuntil(b"\r\n\r\n")
            listening = asyncio.create_task(listen())
            while drops and not listening.done():
                for number in range(len(drops)):
                    writer.write(drops[number : number + 1])
                    await asyncio.wait({listening}, timeout=every)
                    if listening.done():
                        break
            await listening
    except ConnectionError:
        pass  # a reset is an end too
    finally:
        writer.close()
    return bytes(said)
