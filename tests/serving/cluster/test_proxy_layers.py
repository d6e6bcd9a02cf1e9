"""The layer around Ray's proxy, with a proxy that does what each test needs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.serving.cluster.proxy_layers import (
    LIMITS_VARIABLE,
    ProxyGuard,
    ProxyLimits,
    proxy_layers,
    variables,
)
from tests.waiting import LIMIT, run

LIMITS = ProxyLimits(max_body_bytes=100, queue_bytes=250, body_timeout=LIMIT)
APPLICATION = [(b"x-content-type-options", b"nosniff"), (b"x-request-id", b"mine"), (b"X-Request-ID", b"of-the-proxy")]


class Proxy:
    """What stands for Ray's proxy: it reads the whole body, then answers."""

    def __init__(self, status: int | None = 200, headers: Sequence[tuple[bytes, bytes]] = APPLICATION) -> None:
        self.status = status
        self.headers = headers
        self.seen: list[Message] = []
        self.scope: Scope = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        while not self.seen or self.seen[-1].get("more_body"):
            self.seen.append(await receive())
            if self.seen[-1]["type"] == "http.disconnect":
                return  # the proxy gives up, and answers nothing
        await self.gate.wait()
        if self.status is not None:
            await send({"type": "http.response.start", "status": self.status, "headers": list(self.headers)})
            await send({"type": "http.response.body", "body": b"of the proxy"})


async def ask(
    guard: ProxyGuard, parts: Sequence[bytes] = (b"",), headers: Sequence[tuple[bytes, bytes]] = (), path: str = "/x"
) -> tuple[int, dict[str, str], bytes]:
    """Send a request in parts, of which the last ends it unless it is empty and another came before."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    sent: list[Message] = []

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "POST", "headers": list(headers)}
    await guard(scope, receive, send)
    start, *bodies = sent
    names = [name.decode().lower() for name, _ in start["headers"]]
    assert len(set(names)) == len(names)
    answered = {name: value.decode() for name, (_, value) in zip(names, start["headers"], strict=True)}
    return start["status"], answered, b"".join(body.get("body", b"") for body in bodies)


def code(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


def test_an_answer_of_the_application_is_passed_on_with_one_id() -> None:
    async def check() -> None:
        proxy = Proxy(422)
        status, headers, body = await ask(ProxyGuard(proxy, limits=LIMITS), [b"a" * 60, b"b" * 40])
        assert (status, body) == (422, b"of the proxy")
        assert headers["x-request-id"] == "mine"
        assert b"".join(message["body"] for message in proxy.seen) == b"a" * 60 + b"b" * 40

    run(check())


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, (503, "loading")),
        (408, (504, "deadline")),
        (429, (429, "queue_full")),
        (503, (503, "replica_lost")),
        (500, (503, "replica_lost")),
        (None, (503, "replica_lost")),
    ],
)
def test_what_the_proxy_answers_itself_becomes_a_problem(status: int | None, expected: tuple[int, str]) -> None:
    async def check() -> None:
        proxy = Proxy(status, [(b"content-type", b"text/plain")])
        answered, headers, body = await ask(ProxyGuard(proxy, limits=LIMITS))
        assert (answered, code(body)) == expected
        assert headers["content-type"] == "application/problem+json"
        assert ("retry-after" in headers) == (answered in (429, 503))

    run(check())


def test_the_proxy_answers_for_its_own_health() -> None:
    async def check() -> None:
        proxy = Proxy(200, [(b"content-type", b"text/plain")])
        assert (await ask(ProxyGuard(proxy, limits=LIMITS), path="/-/healthz"))[2] == b"of the proxy"

    run(check())


def test_a_body_that_is_declared_too_large_is_refused_unread() -> None:
    async def check() -> None:
        proxy = Proxy()
        status, _, body = await ask(ProxyGuard(proxy, limits=LIMITS), headers=[(b"content-length", b"101")])
        assert (status, code(body)) == (413, "body_too_large")
        assert not proxy.seen

    run(check())


def test_a_body_in_chunks_is_refused_once_it_is_too_large() -> None:
    async def check() -> None:
        proxy = Proxy()
        status, _, body = await ask(ProxyGuard(proxy, limits=LIMITS), [b"a" * 60, b"b" * 41, b"c"])
        assert (status, code(body)) == (413, "body_too_large")
        assert [message["type"] for message in proxy.seen] == ["http.request", "http.disconnect"]

    run(check())


def test_a_body_that_does_not_come_is_refused_and_the_connection_closed() -> None:
    async def check() -> None:
        async def never() -> Message:
            return await asyncio.Event().wait()  # type: ignore[return-value]

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        guard = ProxyGuard(Proxy(), limits=ProxyLimits(100, 250, body_timeout=0.01))
        await guard({"type": "http", "path": "/x", "method": "POST", "headers": []}, never, send)
        assert sent[0]["status"] == 408
        assert (b"connection", b"close") in sent[0]["headers"]
        assert code(sent[1]["body"]) == "body_too_slow"

    run(check())


def test_all_bodies_together_are_bounded_and_given_back() -> None:
    async def check() -> None:
        proxies = [Proxy() for _ in range(4)]
        guard = ProxyGuard(lambda *asgi: proxies.pop()(*asgi), limits=LIMITS)
        for proxy in proxies[1:]:
            proxy.gate.clear()
        held, waiting = proxies[1:], []
        for _ in range(2):
            waiting.append(asyncio.create_task(ask(guard, [b"a" * 100])))
            await asyncio.sleep(0)
        refused = await ask(guard, [b"a" * 100])
        assert (refused[0], code(refused[2])) == (429, "queue_full")
        for proxy in held:
            proxy.gate.set()
        assert [answer[0] for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert (await ask(guard, [b"a" * 100]))[0] == 200

    run(check())


def test_clients_do_not_tell_ray_how_to_handle_their_requests() -> None:
    async def check() -> None:
        proxy = Proxy()
        given = [
            (b"x-request-timeout-seconds", b"-1"),
            (b"x-request-disconnect-disabled", b"?1"),
            (b"serve-multiplexed-model-id", b"x"),
            (b"serve_multiplexed_model_id", b"x"),
            (b"authorization", b"Bearer x"),
        ]
        await ask(ProxyGuard(proxy, limits=LIMITS), headers=given)
        assert proxy.scope["headers"] == [(b"authorization", b"Bearer x")]

    run(check())


def test_limits_come_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits() -> Any:
        return proxy_layers()[0].kwargs["limits"]

    assert limits() == ProxyLimits.of(ServeConfig())
    given = variables(ServeConfig(engine="ray", max_body_bytes=7, body_timeout=3, queue_bytes=20))
    monkeypatch.setenv(LIMITS_VARIABLE, given[LIMITS_VARIABLE])
    assert limits() == ProxyLimits(7, 20, 3.0)
