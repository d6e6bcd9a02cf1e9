"""Bodies on their way in: counted, timed, of a kind that is taken, and held within bounds."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.serving.http import incoming
from qwen_vl_classifier.serving.http.json_bodies import JsonLimits
from qwen_vl_classifier.serving.service import Service
from tests.serving.batch_scorer import settle
from tests.serving.client import Gate, base64_of, check_problem, picture, post, serve, texts, waiting
from tests.serving.clock import AGE, Clock
from tests.waiting import LIMIT, soon

FITTING = json.dumps({"input": [{"text": "a"}]}).encode()


class TestBodies:
    def test_a_body_is_counted_while_it_is_read(self, loaded: ServeConfig) -> None:
        config = replace(loaded, max_body_bytes=1000)
        chunks = 0

        async def stream() -> AsyncIterator[bytes]:
            nonlocal chunks
            for _ in range(100):
                chunks += 1
                yield b" " * 100

        check_problem(post(config, content=stream()), 413, "body_too_large")
        assert chunks == 11, "it went on reading"
        chunks = 0
        check_problem(post(config, content=stream(), headers={"Content-Length": "10"}), 413, "body_too_large")
        assert chunks == 11
        chunks = 0
        check_problem(post(config, content=stream(), headers={"Content-Length": "9" * 30}), 413, "body_too_large")
        assert chunks == 0, "it read although the header said enough"
        fitting = json.dumps({"input": [{"text": "a"}]}).encode().ljust(1000)
        assert post(config, content=fitting).status_code == 200
        check_problem(post(config, content=fitting + b" "), 413, "body_too_large")

    @pytest.mark.parametrize("option", ["body_timeout", "deadline"])
    def test_a_body_that_does_not_arrive_is_not_waited_for(self, loaded: ServeConfig, option: str) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            clock = Clock()

            async def stream() -> AsyncIterator[bytes]:
                yield b"{"
                clock.ahead += AGE
                await asyncio.Event().wait()

            return await client.post("/v1/classify", content=stream())

        check_problem(serve(replace(loaded, **{option: AGE}), work), 408, "body_too_slow")

    def test_one_that_drips_is_not_waited_for_either(self, loaded: ServeConfig) -> None:
        drops = 0

        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            clock = Clock()

            async def stream() -> AsyncIterator[bytes]:
                nonlocal drops
                while True:
                    yield b" "
                    drops += 1
                    clock.ahead += 4 * AGE
                    await settle()

            return await client.post("/v1/classify", content=stream())

        check_problem(serve(replace(loaded, body_timeout=10 * AGE), work), 408, "body_too_slow")
        assert drops == 3

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            ("application/json", None),
            ("Application/JSON; charset=utf-8", None),
            ("", None),
            ("text/plain", "unsupported_media_type"),
            ("application/x-www-form-urlencoded", "unsupported_media_type"),
            ("application/jsonl", "unsupported_media_type"),
            ("application/json, text/plain", "unsupported_media_type"),
            ("image/png", "unsupported_media_type"),
        ],
    )
    def test_kinds(self, loaded: ServeConfig, kind: str, code: str | None) -> None:
        response = post(loaded, content=FITTING, headers={"Content-Type": kind})
        if code is None:
            assert response.status_code == 200
        else:
            check_problem(response, 415, code)

    def test_forms_are_for_classify_alone(self, loaded: ServeConfig) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> list[httpx.Response]:
            paths = ("/v1/moderations", "/v1/explain")
            return [await client.post(path, files={"text": (None, "a")}) for path in paths]

        for response in serve(loaded, work):
            check_problem(response, 415, "unsupported_media_type")

    def test_compressed_ones_are_refused(self, loaded: ServeConfig) -> None:
        content = gzip.compress(FITTING)
        response = post(loaded, content=content, headers={"Content-Encoding": "gzip"})
        check_problem(response, 415, "unsupported_encoding")
        assert post(loaded, content=FITTING, headers={"Content-Encoding": "identity"}).status_code == 200


class TestBounds:
    def test_a_full_queue_is_known_before_a_body_is_read(self, loaded: ServeConfig, gate: Gate) -> None:
        config = replace(loaded, max_batch=1, queue_size=1)
        read = 0

        async def stream() -> AsyncIterator[bytes]:
            nonlocal read
            read += 1
            yield FITTING

        async def work(client: httpx.AsyncClient, service: Service) -> httpx.Response:
            accepted = [asyncio.create_task(client.post("/v1/classify", **texts("first")))]
            await asyncio.to_thread(gate.entered.wait)
            accepted.append(asyncio.create_task(client.post("/v1/classify", **texts("second"))))
            await waiting(service, 1)
            response = await client.post("/v1/classify", content=stream())
            gate.open.set()
            assert [one.status_code for one in await asyncio.gather(*accepted)] == [200, 200]
            return response

        check_problem(serve(config, work), 429, "queue_full")
        assert read == 0

    def test_all_bodies_together_are_bounded(self, loaded: ServeConfig) -> None:
        """Beside two bodies on their way a third would hold more than is free; it is let in once they are gone."""
        config = replace(loaded, queue_bytes=4 * 256 * 1024)

        async def work(client: httpx.AsyncClient, service: Service) -> httpx.Response:
            release = asyncio.Event()

            async def stream() -> AsyncIterator[bytes]:
                yield b" "
                await release.wait()
                yield FITTING

            slow = [asyncio.create_task(client.post("/v1/classify", content=stream())) for _ in range(2)]
            await soon(lambda: service.admission.held == 2 * 256 * 1024)
            response = await client.post("/v1/classify", **texts("a"))
            release.set()
            assert [one.status_code for one in await asyncio.gather(*slow)] == [200, 200]
            assert (await client.post("/v1/classify", **texts("a"))).status_code == 200
            return response

        response = serve(config, work)
        check_problem(response, 429, "queue_full")
        assert int(response.headers["Retry-After"]) >= 1

    def test_a_body_larger_than_what_may_be_held_is_refused(self, loaded: ServeConfig) -> None:
        config = replace(loaded, queue_bytes=256 * 1024)
        body = {"input": [{"image": base64_of(picture("red")), "text": "a"}], "model": "x" * 256 * 1024}
        check_problem(post(config, json=body), 429, "queue_full")


class TestLargeBodies:
    def test_others_are_answered_while_one_is_parsed(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entered, go_on = threading.Event(), threading.Event()
        parse = incoming.parse_json

        def slow(body: bytes, limits: JsonLimits) -> Any:
            if len(body) > 1_000_000:
                entered.set()
                go_on.wait(LIMIT)
            return parse(body, limits)

        monkeypatch.setattr(incoming, "parse_json", slow)

        async def work(client: httpx.AsyncClient, _: Service) -> list[int]:
            large = [
                asyncio.create_task(client.post("/v1/classify", content=FITTING.ljust(size)))
                for size in (3_000_000, 3_000_000)
            ]
            await asyncio.to_thread(entered.wait, LIMIT)
            try:
                small = [
                    await client.get("/livez"),
                    await client.post("/v1/classify", content=FITTING),
                    await client.post("/v1/classify", content=FITTING.ljust(100_000)),
                ]
                assert not any(task.done() for task in large)
            finally:
                go_on.set()
            return [one.status_code for one in (*small, *await asyncio.gather(*large))]

        assert serve(loaded, work) == [200] * 5

    def test_one_that_waits_too_long_to_be_parsed_is_answered_504(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go_on = threading.Event()
        monkeypatch.setattr(incoming, "parse_json", lambda *_: go_on.wait(LIMIT))

        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            clock = Clock()
            asking = asyncio.create_task(client.post("/v1/classify", content=FITTING.ljust(100_000)))
            await settle()
            clock.ahead += 2 * AGE
            try:
                return await asking
            finally:
                go_on.set()

        check_problem(serve(replace(loaded, deadline=AGE), work), 504, "deadline")

    def test_a_name_of_no_model_again_and_again(self, loaded: ServeConfig) -> None:
        """No more of them are looked at than there are models."""
        response = post(loaded, json={"model": ["claims"] * 50_000, "input": [{"text": "a"}]})
        check_problem(response, 400, "model_twice")
