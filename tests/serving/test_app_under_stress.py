"""The application without a socket: overload, defects, and the way up and down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.errors import ArtifactError, OutOfMemoryError
from qwen_vl_classifier.serving.models import registry
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import (
    Gate,
    Score,
    base64_of,
    check_problem,
    client_of,
    picture,
    post,
    run,
    serve,
    texts,
    waiting,
)
from tests.serving.clock import FOREVER, Clock
from tests.waiting import LIMIT, soon


class TestOverload:
    def test_too_many_is_429_and_those_accepted_are_answered(self, loaded: ServeConfig, gate: Gate) -> None:
        config = replace(loaded, max_batch=1, queue_size=2)

        async def work(
            client: httpx.AsyncClient, service: Service
        ) -> tuple[list[httpx.Response], list[httpx.Response]]:
            accepted = [asyncio.create_task(client.post("/v1/classify", **texts("first")))]
            await asyncio.to_thread(gate.entered.wait)
            accepted.append(asyncio.create_task(client.post("/v1/classify", **texts("second"))))
            await waiting(service, 1)
            refused = [await client.post("/v1/classify", **texts("a", "b"))]  # one place is free
            accepted.append(asyncio.create_task(client.post("/v1/classify", **texts("third"))))
            await waiting(service, 2)
            refused.append(await client.post("/v1/classify", **texts("c")))
            gate.open.set()
            return await asyncio.gather(*accepted), refused

        accepted, refused = serve(config, work)
        assert [response.status_code for response in accepted] == [200, 200, 200]
        for response in refused:
            check_problem(response, 429, "queue_full")
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        assert gate.seen == ["first", "second", "third"]

    def test_bodies_are_not_read_beyond_what_could_wait(self, loaded: ServeConfig) -> None:
        config = replace(loaded, max_batch=1, queue_size=1)

        async def work(client: httpx.AsyncClient, service: Service) -> httpx.Response:
            release = asyncio.Event()

            async def stream() -> AsyncIterator[bytes]:
                await release.wait()
                yield b"{}"

            slow = [asyncio.create_task(client.post("/v1/classify", content=stream())) for _ in range(2)]
            await soon(lambda: service.admission.requests == 2)
            response = await client.post("/v1/classify", **texts("a"))
            release.set()
            assert [one.status_code for one in await asyncio.gather(*slow)] == [400, 400]
            assert (await client.post("/v1/classify", **texts("a"))).status_code == 200
            return response

        check_problem(serve(config, work), 429, "queue_full")

    def test_a_model_that_hangs_is_504(self, loaded: ServeConfig, gate: Gate) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            clock = Clock()
            asking = asyncio.create_task(client.post("/v1/classify", **texts("a")))
            await asyncio.to_thread(gate.entered.wait)
            clock.ahead += FOREVER
            return await asking

        check_problem(serve(loaded, work), 504, "deadline")

    def test_one_who_hangs_up_is_not_scored(self, loaded: ServeConfig, gate: Gate) -> None:
        """Spoken in ASGI itself, since no client of ours hangs up within one process."""
        config = replace(loaded, max_batch=1)

        async def main() -> None:
            app = create_app(config)
            async with client_of(app) as client:
                first = asyncio.create_task(client.post("/v1/classify", **texts("first")))
                await asyncio.to_thread(gate.entered.wait)
                body = json.dumps({"input": [{"text": "gone"}]}).encode()
                messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
                hung_up = asyncio.Event()

                async def receive() -> dict[str, Any]:
                    if messages:
                        return messages.pop()
                    await hung_up.wait()
                    return {"type": "http.disconnect"}

                async def send(message: Any) -> None:
                    pass

                scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b""}
                scope["headers"] = [(b"host", b"localhost")]
                leaving = asyncio.create_task(app(scope, receive, send))
                await waiting(app.state.service, 1)
                assert not leaving.done()
                hung_up.set()
                await leaving  # without waiting for the model
                last = asyncio.create_task(client.post("/v1/classify", **texts("last")))
                await waiting(app.state.service, 1)
                gate.open.set()
                assert (await first).status_code == (await last).status_code == 200

        run(main())
        assert gate.seen == ["first", "last"]


class TestDefects:
    SECRET = "/home/secret/model.safetensors"

    def test_a_defect_of_the_model_is_500_without_detail(
        self, loaded: ServeConfig, scoring: Callable[[Score], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(words: Sequence[str]) -> list[float]:
            raise RuntimeError(self.SECRET)

        scoring(broken)
        response = post(loaded, **texts("a", "b"))
        check_problem(response, 500, "internal_error")
        assert "secret" not in response.text
        assert self.SECRET in caplog.text, "the log must say what the answer does not"

    def test_one_example_that_breaks_the_model_spoils_no_other(
        self, loaded: ServeConfig, scoring: Callable[[Score], None]
    ) -> None:
        failures: dict[str, Exception] = {"bug": RuntimeError(self.SECRET), "big": OutOfMemoryError(self.SECRET)}

        def score(words: Sequence[str]) -> list[float]:
            for word in words:
                if word in failures:
                    raise failures[word]
            return [float("nan") if word == "nan" else 1.0 for word in words]

        scoring(score)
        response = post(loaded, **texts("a", "bug", "b", "big", "nan", "c"))
        assert response.status_code == 200
        assert "secret" not in response.text
        codes = [result.get("error", {}).get("code") for result in response.json()["data"]]
        assert codes == [None, "internal_error", None, "out_of_memory", "internal_error", None]
        assert response.json()["usage"]["total_tokens"] > 0

    def test_a_defect_of_the_application_is_500_without_detail(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: Service, *_: Any) -> None:
            raise RuntimeError(TestDefects.SECRET)

        monkeypatch.setattr(Service, "classify", broken)
        response = post(loaded, **texts("a"))
        check_problem(response, 500, "internal_error")
        assert "secret" not in response.text
        assert "Traceback" not in response.text


class TestUpAndDown:
    def test_health_while_loading_and_after(self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        load, gate = registry._load, threading.Event()

        def slowly(*arguments: Any) -> Any:
            gate.wait(LIMIT)
            return load(*arguments)

        monkeypatch.setattr(registry, "_load", slowly)

        async def work(client: httpx.AsyncClient, service: Service) -> None:
            assert (await client.get("/livez")).json() == {"status": "live"}
            for response in (
                await client.get("/readyz"),
                await client.get("/v1/models"),
                await client.post("/v1/classify", **texts("a")),
            ):
                assert "loading" in check_problem(response, 503, "loading")
                assert response.headers["Retry-After"] == "1"
            gate.set()
            await soon(lambda: service.state == "ready")
            assert (await client.get("/readyz")).json() == {"status": "ready"}

        serve(loaded, work, state=None)

    @pytest.mark.parametrize("error", [ArtifactError("/home/secret: damaged"), RuntimeError("/home/secret")])
    def test_classifiers_that_cannot_be_loaded(
        self,
        loaded: ServeConfig,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: Exception,
    ) -> None:
        monkeypatch.setattr(registry, "_load", lambda served, folders, _: (served, dict.fromkeys(folders, error)))

        async def work(client: httpx.AsyncClient, _: Service) -> None:
            for path in ("/livez", "/readyz", "/v1/models"):
                response = await client.get(path)
                check_problem(response, 503, "failed")
                assert "secret" not in response.text

        serve(loaded, work, state="failed")
        assert "/home/secret" in caplog.text
        assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError)

        seen: list[Exception] = []

        async def main() -> None:
            async with client_of(create_app(loaded, on_failure=seen.append), state="failed"):
                pass

        run(main())
        assert seen == [error]

    def test_going_down_finishes_what_was_accepted(self, loaded: ServeConfig, gate: Gate) -> None:
        config = replace(loaded, max_batch=1, grace=FOREVER)

        async def main() -> None:
            app = create_app(config)
            body_may_end = asyncio.Event()

            async def stream() -> AsyncIterator[bytes]:
                yield b'{"input": [{"image": "'
                await body_may_end.wait()
                yield base64_of(picture("red")).encode()
                yield b'", "text": "streamed"}]}'

            async with contextlib.AsyncExitStack() as lifespan:
                client = await lifespan.enter_async_context(client_of(app))
                accepted = [
                    asyncio.create_task(client.post("/v1/classify", **texts("first"))),
                    asyncio.create_task(client.post("/v1/classify", **texts("second", "third"))),
                    asyncio.create_task(client.post("/v1/classify", content=stream())),
                ]
                await asyncio.to_thread(gate.entered.wait)
                await soon(lambda: app.state.service.admission.requests == len(accepted))
                closing = asyncio.create_task(app.state.service.close())
                await soon(lambda: app.state.service.state == "draining")
                for path in ("/readyz", "/v1/models"):
                    check_problem(await client.get(path), 503, "draining")
                assert (await client.get("/livez")).status_code == 200
                check_problem(await client.post("/v1/classify", **texts("late")), 503, "draining")
                assert not closing.done()
                body_may_end.set()
                gate.open.set()
                await closing
                assert [response.status_code for response in await asyncio.gather(*accepted)] == [200, 200, 200]

        run(main())
        assert sorted(gate.seen) == ["first", "second", "streamed", "third"]
