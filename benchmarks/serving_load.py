"""The other side of the serving benchmark: a process of its own that asks a server, and says what came back.

    python benchmarks/serving_load.py '{"url": "http://127.0.0.1:8000", "mode": "open", "rate": 20, "seconds": 10}'

It speaks HTTP/1.1 by itself, since a client library would cost more than the server it measures. In mode "open",
requests leave at even distances, or at random moments (a Poisson process), whether or not earlier ones are answered, so
that a slow server cannot slow its own load down. In mode "closed", so many callers ask one request after the other; in
mode "burst" all connections are open before the first byte is sent. Only loopback is asked.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pictures import examples

from qwen_vl_classifier import Example

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked.

    Attributes:
        url: Of the server, on loopback.
        mode: "open", "closed" or "burst".
        rate: Requests a second, of an open load.
        random: Whether they leave at random moments.
        seconds: How long an open load lasts.
        count: Requests of a closed load or a burst.
        callers: Of a closed load.
        pictures: How many different pictures there are; requests take them in turn, each with a text of its own.
        side: Of a picture, in pixels.
        items: Examples in one request.
        words: Put before every text.
        seed: Of pictures and moments.
        patience: Seconds to wait for an answer.
        hang_up: Seconds after which a caller leaves without an answer; 0 waits.
    """

    url: str
    mode: str = "open"
    rate: float = 1.0
    random: bool = True
    seconds: float = 1.0
    count: int = 1
    callers: int = 1
    pictures: int = 256
    side: int = 364
    items: int = 1
    words: str = ""
    seed: int = 0
    patience: float = 60.0
    hang_up: float = 0.0


@dataclass(slots=True)
class Outcomes:
    """What came back: status and seconds of each request, in the order of their end; status 0 is no answer."""

    statuses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def to_json(self, elapsed: float) -> dict[str, Any]:
        """Sum up: counts by status, and percentiles of seconds by status."""
        statuses = np.array(self.statuses)
        seconds = np.array(self.seconds)
        return {
            "elapsed": elapsed,
            "requests": len(statuses),
            "statuses": {str(status): int((statuses == status).sum()) for status in np.unique(statuses)},
            "seconds": {
                str(status): dict(
                    zip(
                        ("p50", "p90", "p99", "max"),
                        np.percentile(seconds[statuses == status], [50, 90, 99, 100]).round(4).tolist(),
                        strict=True,
                    )
                )
                for status in np.unique(statuses)
            },
            "unanswered": self.unanswered,
            "failures": dict(self.failures),
        }


class Caller:
    """Asks one server over connections that are kept and used again.

    Args:
        load: What is asked.
    """

    def __init__(self, load: Load) -> None:
        address = urlsplit(load.url)
        if address.hostname != _LOOPBACK:
            raise SystemExit(f"{load.url}: only {_LOOPBACK} is asked")
        self._load = load
        self._port = address.port or 80
        self._requests = Requests(load)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.outcomes = Outcomes()

    async def connect(self) -> None:
        """Open one more connection and keep it."""
        self._free.append(await asyncio.open_connection(_LOOPBACK, self._port))

    async def disconnect(self) -> None:
        """Close the connections that are kept."""
        while self._free:
            _, writer = self._free.pop()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def ask(self, number: int) -> None:
        """Send one request and note what comes back."""
        started = time.perf_counter()
        name = f"load-{self._load.seed}-{number}"
        try:
            async with asyncio.timeout(self._load.hang_up or self._load.patience):
                status = await self._exchange(number, name)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            status = 0
            self.outcomes.failures[type(error).__name__] += 1
            self.outcomes.unanswered.append(name)
        self.outcomes.statuses.append(status)
        self.outcomes.seconds.append(time.perf_counter() - started)

    async def _exchange(self, number: int, name: str) -> int:
        body = self._requests.body(number)
        request = (
            b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"X-Request-ID: %s\r\nContent-Length: %d\r\n\r\n" % (name.encode(), len(body))
        )
        while True:
            again = bool(self._free)
            reader, writer = self._free.pop() if again else await asyncio.open_connection(_LOOPBACK, self._port)
            keep = False
            try:
                writer.write(request)
                writer.write(body)
                await writer.drain()
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(head.split("content-length:", maxsplit=1)[1].split("\r\n", maxsplit=1)[0])
                await reader.readexactly(length)
                keep = "connection: close" not in head
                return int(head.split(" ", maxsplit=2)[1])
            except (ConnectionError, asyncio.IncompleteReadError):
                # A server may close a connection that nobody uses, at the moment when somebody does: clients then
                # take another one (RFC 9110, section 9.2.2), and only what a fresh one loses is lost.
                if not again:
                    raise
            finally:
                if keep:
                    self._free.append((reader, writer))
                else:
                    writer.close()


class Requests:
    """What the requests of a load hold: pictures in turn, and a text that no other request has.

    Args:
        load: Its pictures, items, words and seed decide.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._rows = examples(load.pictures, [(load.side, load.side)], (16, 16), seed=load.seed)
        self._encoded = [base64.b64encode(bytes(row.images[0])).decode() for row in self._rows]

    def examples(self, number: int) -> list[Example]:
        """Return the examples of a request, for whoever does the same work without a server."""
        return [Example(self._rows[row].image, text) for row, text in self._parts(number)]

    def body(self, number: int) -> bytes:
        """Return the body of a request."""
        items = ", ".join(
            f'{{"image": "{self._encoded[row]}", "text": {json.dumps(text)}}}' for row, text in self._parts(number)
        )
        return f'{{"input": [{items}]}}'.encode()

    def _parts(self, number: int) -> list[tuple[int, str]]:
        first = number * self._load.items
        rows = [(first + offset) % len(self._rows) for offset in range(self._load.items)]
        return [(row, f"{self._load.words}{self._rows[row].text} {first + i}") for i, row in enumerate(rows)]


async def run(load: Load, on_ready: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Put a load on a server; return what came of it.

    Args:
        load: What is asked.
        on_ready: Called when pictures are made: whoever measures may start its clock.
    """
    caller = Caller(load)
    rng = np.random.default_rng(load.seed)
    on_ready()
    started = time.perf_counter()
    if load.mode == "open":
        asked: set[asyncio.Task[None]] = set()
        moment, number = 0.0, 0
        while moment < load.seconds:
            await asyncio.sleep(max(0.0, moment - (time.perf_counter() - started)))
            task = asyncio.create_task(caller.ask(number))
            asked.add(task)
            task.add_done_callback(asked.discard)
            moment += rng.exponential(1 / load.rate) if load.random else 1 / load.rate
            number += 1
        while asked:
            await asyncio.wait(asked)
    elif load.mode == "closed":
        numbers = iter(range(load.count))

        async def call() -> None:
            for number in numbers:
                await caller.ask(number)

        await asyncio.gather(*(call() for _ in range(load.callers)))
    else:
        for _ in range(load.count):
            await caller.connect()
        started = time.perf_counter()
        await asyncio.gather(*(caller.ask(number) for number in range(load.count)))
    elapsed = time.perf_counter() - started
    await caller.disconnect()
    return caller.outcomes.to_json(elapsed)


def main() -> None:
    """Read the load from the command line, and print what came of it as one line of JSON."""
    outcome = asyncio.run(run(Load(**json.loads(sys.argv[1])), lambda: print("ready", flush=True)))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
