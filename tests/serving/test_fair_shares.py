"""Callers who are slow, idle, gone or greedy do not shut out others: the application as a whole."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qwen_vl_classifier import Classifier, ServeConfig
from qwen_vl_classifier.serving import service as service_module
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import DecoderHere, base64_of, check_problem, picture, serve, texts
from tests.serving.clock import AGE, FOREVER, Clock
from tests.serving.server_process import ServerProcess, running
from tests.waiting import soon


def with_pictures(*files: bytes) -> dict[str, Any]:
    return {"json": {"input": [{"text": "x", "image": base64_of(file)} for file in files]}}


def test_slow_uploads_give_way_when_no_more_requests_may_be_in_progress(loaded: ServeConfig) -> None:
    config = replace(loaded, max_batch=4, queue_size=4)

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        clock = Clock()

        async def stream() -> AsyncIterator[bytes]:
            yield b'{"input": '
            await asyncio.Event().wait()

        slow = [asyncio.create_task(client.post("/v1/classify", content=stream())) for _ in range(8)]
        await soon(lambda: service.admission.requests == 8)
        clock.ahead += AGE
        for number in range(12):
            response = await client.post("/v1/classify", **texts("a") if number % 2 else with_pictures(picture("red")))
            assert response.status_code == 200, number
        done, left = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1, "one gave way, and its place was enough for all others"
        check_problem(done.pop().result(), 429, "queue_full")
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    serve(config, work)


def test_one_request_of_many_slow_pictures_makes_nobody_else_wait_for_all_of_them(
    loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 pictures that take an age each; text alone is answered meanwhile, and a picture after one of them."""
    large = [picture("red", size=(40, 30 + number)) for number in range(64)]
    begun, steps = itertools.count(), asyncio.Semaphore(0)
    seen: list[int] = []

    class Slow(DecoderHere):
        async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
            if data in large:
                seen.append(next(begun))
                await steps.acquire()
            return await super().decode(data)

    monkeypatch.setattr(service_module, "DecoderPool", Slow)

    async def work(client: httpx.AsyncClient, _: Service) -> None:
        clock = Clock()
        attack = asyncio.create_task(client.post("/v1/classify", **with_pictures(*large)))
        await soon(lambda: len(seen) == 1)
        for _ in range(3):
            clock.ahead += AGE
            steps.release()
        await soon(lambda: len(seen) == 4)
        assert (await client.post("/v1/classify", **texts("a"))).status_code == 200
        honest = asyncio.create_task(client.post("/v1/classify", **with_pictures(picture("blue"))))
        await asyncio.sleep(0)
        await soon(lambda: honest.done() or not steps.release())
        assert (await honest).status_code == 200
        assert len(seen) < 32
        for _ in large:
            steps.release()
        assert (await attack).status_code == 200

    serve(replace(loaded, decode_workers=1, deadline=FOREVER), work)


class Attackers:
    """Threads that misuse a server until they are told to end."""

    def __init__(self, server: ServerProcess) -> None:
        self._address = server.address
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, count: int, begin: bytes, *, sends: bytes = b"", reads: bool = True) -> None:
        """Open so many connections again and again: send something, then one byte after the other, or go away."""
        for number in range(count):
            chance = random.Random(number)
            thread = threading.Thread(target=self._attack, args=(chance, begin, sends, reads))
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _attack(self, chance: random.Random, begin: bytes, sends: bytes, reads: bool) -> None:
        while not self._over.wait(chance.random()):
            try:
                with socket.create_connection(self._address) as connection:
                    if not reads:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                    connection.sendall(begin)
                    while sends and not self._over.wait(1):
                        connection.sendall(sends)
                    self._over.wait(0 if reads else 5)
            except OSError:
                pass


def post(body: bytes, length: int = 0) -> bytes:
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.soak
@pytest.mark.parametrize("deadline", [5, 30])
def test_a_minute_of_slow_and_honest_callers(tmp_path: Path, tiny_classifier: Classifier, deadline: int) -> None:
    """Slow uploads beyond all places, slow readers, callers who leave, and large requests; nobody honest is refused."""
    folder = str(tiny_classifier.save(tmp_path / "claims"))
    options = ("--device", "cpu", "--port", "0", "--deadline", str(deadline), "--insecure")
    with running(tmp_path / "log", "-m", "qwen_vl_classifier", "serve", folder, *options) as server:
        server.until_ready()
        some = b'{"input": [{"text": "few words"}]}'
        many = b'{"input": [' + b",".join(b'{"text": "%d words"}' % number for number in range(64)) + b"]}"
        attackers = Attackers(server)
        attackers.start(320, post(b'{"input": [{"text": "', 1_000_000), sends=b"a")
        attackers.start(10, post(many), reads=False)
        attackers.start(5, post(many))
        try:
            answers = []
            end = time.monotonic() + 60
            with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
                for number in itertools.count():
                    if time.monotonic() > end:
                        break
                    picture_of_this = picture("red", size=(60 + number % 40, 50))
                    content = {"json": {"input": [{"text": "a", "image": base64_of(picture_of_this)}]}}
                    answers.append(client.post("/v1/classify", **content if number % 2 else {"content": some}))
                    time.sleep(0.1)
        finally:
            attackers.end()
        assert {answer.status_code for answer in answers} == {200}
        assert not any("error" in answer.json()["data"][0] for answer in answers)
        assert len(answers) > 20


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the most memory that was used")
def test_memory_stays_within_the_budget_and_300_mb(tmp_path: Path, tiny_classifier: Classifier) -> None:
    """64 pictures of 25 MP in one request, hundreds of requests at once, bodies in base64: all within the bound."""
    budget = 400_000_000
    folder = str(tiny_classifier.save(tmp_path / "claims"))
    options = ("--device", "cpu", "--port", "0", "--queue-bytes", str(budget))

    def large(number: int) -> dict[str, str]:
        stream = io.BytesIO()
        Image.new("L", (5000, 5000), number).save(stream, "PNG", compress_level=1)
        return {"text": "x", "image": base64_of(stream.getvalue())}

    attack = json.dumps({"input": [large(number) for number in range(64)]}).encode()
    small = [json.dumps(with_pictures(picture("red", size=(500 + n, 400)))["json"]).encode() for n in range(100)]

    def most(server: ServerProcess) -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])

    with running(tmp_path / "log", "-m", "qwen_vl_classifier", "serve", folder, *options) as server:
        server.until_ready()

        def ask(body: bytes) -> int:
            return httpx.post(f"{server.url}/v1/classify", content=body, timeout=90, trust_env=False).status_code

        assert ask(small[0]) == 200
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
        before = most(server)
        with ThreadPoolExecutor(104) as threads:
            statuses = list(threads.map(ask, [attack] * 4 + small * 3))
        assert set(statuses) <= {200, 429, 504}
        assert most(server) - before <= budget + 300_000_000
