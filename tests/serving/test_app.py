"""The application without a socket: answers, errors, overload, keys, and the way up and down."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import io
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from qwen_vl_classifier import Classifier, Example, Panel, ServeConfig, Tap, create_app
from qwen_vl_classifier.errors import ArtifactError, ConfigError, OutOfMemoryError
from qwen_vl_classifier.serving import service as service_module
from qwen_vl_classifier.serving.service import Scored, Service

T = TypeVar("T")

Score = Callable[[Sequence[Example]], list[Scored]]


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(limited())


async def settle() -> None:
    """Let all tasks come as far as they can without threads or time: a sleep would be a guess about the machine."""
    for _ in range(300):
        await asyncio.sleep(0)


def picture(colour: str, format: str = "PNG", size: tuple[int, int] = (90, 70)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, format)
    return stream.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64_of(data)}"


@contextlib.asynccontextmanager
async def client_of(
    app: FastAPI, *, state: str | None = "ready", key: str | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application's lifespan, wait for a state, and give a client of it."""
    headers = {"Authorization": f"Bearer {key}"} if key else None
    async with app.router.lifespan_context(app):
        while state and app.state.service.state != state:
            await asyncio.sleep(0.01)
        # Defects become answers, as under a real server.
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            yield client


def serve(
    config: ServeConfig, work: Callable[[httpx.AsyncClient, Service], Coroutine[Any, Any, T]], **options: Any
) -> T:
    """Run `work` on a client of a fresh application."""

    async def main() -> T:
        app = create_app(config)
        async with client_of(app, **options) as client:
            return await work(client, app.state.service)

    return run(main())


def post(config: ServeConfig, **request: Any) -> httpx.Response:
    """Send one request to a fresh application."""

    async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
        return await client.post("/v1/classify", **request)

    return serve(config, work)


def check_problem(response: httpx.Response, status: int, code: str) -> str:
    """Check the shape of a problem and return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    content = response.json()
    assert content.keys() == {"type", "title", "status", "detail", "error"}
    assert content["status"] == status
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert content["error"]["code"] == code
    assert content["error"]["message"] == content["detail"]
    assert "\n" not in content["detail"]
    return str(content["detail"])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier) -> ServeConfig:
    """A configuration whose classifiers are there at once: one in memory for each name."""

    def load(config: ServeConfig) -> Panel:
        return Panel([tiny_classifier] * len(config.classifiers))

    monkeypatch.setattr(service_module, "_load_panel", load)
    return ServeConfig(classifiers=("claims",))


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], None]:
    """Return a function that puts another in the place of the model."""

    def replace(score: Score) -> None:
        monkeypatch.setattr(Service, "_score", staticmethod(score))

    return replace


class Gate:
    """A model that says one half, counts what it saw, and can be held shut."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, examples: Sequence[Example]) -> list[Scored]:
        self.seen += [example.text for example in examples]
        self.entered.set()
        self.open.wait()
        return [Scored(probabilities=((0.5, 0.5),), tokens=1) for _ in examples]


@pytest.fixture
def gate(loaded: ServeConfig, scoring: Callable[[Score], None]) -> Iterator[Gate]:
    gate = Gate()
    scoring(gate)
    yield gate
    gate.open.set()


def texts(*words: str) -> dict[str, Any]:
    return {"json": {"input": [{"text": word} for word in words]}}


class TestAnswers:
    def test_saved_classifiers_answer_as_they_do_offline(self, tmp_path: Path, tiny_classifier: Classifier) -> None:
        other = copy.copy(tiny_classifier)
        other.tap, other.temperature, other.threshold = Tap(2, "last"), 0.3, 0.4
        folders = (str(tiny_classifier.save(tmp_path / "first")), str(other.save(tmp_path / "second")))
        red, blue = picture("red"), picture("blue", "JPEG", (140, 60))
        rows: list[tuple[Any, Example]] = [
            ({"image": data_uri(red), "text": "It is red."}, Example(red, "It is red.")),
            ({"image": base64_of(blue), "text": "It is red."}, Example(blue, "It is red.")),
            ({"image": [base64_of(red), data_uri(blue)], "text": "a pair"}, Example((red, blue), "a pair")),
            ({"image": None, "text": "<|image_pad|> no picture"}, Example(None, "<|image_pad|> no picture")),
            ({"image": [], "text": "words"}, Example(None, "words")),
            ({"text": "\u4f60\u597d \U0001f600"}, Example(None, "\u4f60\u597d \U0001f600")),
            ({"image": base64_of(picture("green", "WEBP")), "text": "x"}, Example(picture("green", "WEBP"), "x")),
        ]
        examples = [example for _, example in rows]

        async def work(client: httpx.AsyncClient, _: Service) -> list[httpx.Response]:
            return list(
                await asyncio.gather(
                    *(
                        client.post(path, json={"model": model, "input": [item for item, _ in rows]})
                        for model in ("first", "second")
                        for path in ("/v1/classify", "/classify")
                    )
                )
            )

        responses = serve(ServeConfig(classifiers=folders, device="cpu"), work)
        for number, response in enumerate(responses):
            classifier = (tiny_classifier, other)[number // 2]
            assert response.status_code == 200, response.text
            content = response.json()
            assert content.keys() == {"id", "object", "created", "model", "data", "usage"}
            assert (content["object"], content["model"]) == ("list", ("first", "second")[number // 2])
            assert [result["index"] for result in content["data"]] == list(range(len(rows)))
            expected = classifier.predict_proba(examples)
            np.testing.assert_allclose([result["probs"] for result in content["data"]], expected, atol=1e-5)
            for result in content["data"]:
                assert result.keys() == {"index", "label", "probs", "score", "threshold", "decision"}
                assert result["score"] == result["probs"][1]
                assert result["threshold"] == classifier.threshold
                assert result["label"] == int(result["score"] >= classifier.threshold)
                assert result["decision"] == ("yes" if result["label"] else "no")
            tokens = sum(len(item.ids) for item in classifier.backbone.prepare(examples))
            assert content["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert len({response.json()["id"] for response in responses}) == len(responses)

    def test_requests_at_one_time_share_passes_and_keep_their_own_results(
        self, loaded: ServeConfig, tiny_classifier: Classifier
    ) -> None:
        words = [f"claim number {number}" for number in range(24)]

        async def work(client: httpx.AsyncClient, _: Service) -> list[float]:
            responses = await asyncio.gather(*(client.post("/v1/classify", **texts(word)) for word in words))
            return [response.json()["data"][0]["score"] for response in responses]

        expected = tiny_classifier.predict_proba([Example(None, word) for word in words])[:, 1]
        np.testing.assert_allclose(serve(loaded, work), expected, atol=1e-5)
        assert len(set(expected)) > 1

    def test_the_abstention_band_is_kept(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier
    ) -> None:
        monkeypatch.setattr(tiny_classifier, "abstention", (0.0, 1.0))
        assert post(loaded, **texts("a")).json()["data"][0]["decision"] == "abstain"

    def test_a_bad_item_has_its_own_error_and_spoils_no_other(
        self, loaded: ServeConfig, tiny_classifier: Classifier
    ) -> None:
        good = {"image": data_uri(picture("red")), "text": "It is red."}
        bad: list[tuple[Any, str]] = [
            ({"image": "https://example.org/secret.png", "text": "x"}, "invalid_image"),
            ({"image": "/etc/secret", "text": "x"}, "invalid_image"),
            ({"image": base64_of(b"secret" * 20), "text": "x"}, "invalid_image"),
            ({"image": [good["image"], data_uri(picture("red", "GIF"))], "text": "x"}, "invalid_image"),
            ({"image": base64_of(picture("red")[:-20]), "text": "x"}, "invalid_image"),
            ({"image": base64_of(picture("red", size=(201, 1))), "text": "x"}, "invalid_image"),
            ({"image": 5, "text": "x"}, "invalid_item"),
            ({"image": [good["image"]] * 9, "text": "x"}, "invalid_item"),
            ({"image": good["image"]}, "invalid_item"),
            ({"text": " "}, "invalid_item"),
            ({"text": "x", "secret": "secret"}, "invalid_item"),
            ({"text": ["secret"]}, "invalid_item"),
            ("secret", "invalid_item"),
            (None, "invalid_item"),
            ({"text": "x" * 8001}, "too_large"),
        ]
        items = [part for item, _ in bad for part in (item, good)]
        body = json.dumps({"input": [{"text": "\ud800"}, *items]})  # half of a surrogate pair, as JSON spells it
        response = post(loaded, content=body)
        assert response.status_code == 200, response.text
        assert "secret" not in response.text
        surrogate, *results = response.json()["data"]
        assert surrogate["error"]["code"] == "invalid_item"
        (expected,) = tiny_classifier.predict_proba([Example(picture("red"), "It is red.")])[:, 1]
        for number, (_, code) in enumerate(bad):
            failed, neighbour = results[2 * number : 2 * number + 2]
            assert failed.keys() == {"index", "error"}
            assert failed["error"]["code"] == code, failed
            assert neighbour["score"] == pytest.approx(expected, abs=1e-5)

    def test_a_request_of_nothing_but_bad_items_is_answered_too(self, loaded: ServeConfig) -> None:
        response = post(loaded, **texts("", " "))
        assert response.status_code == 200
        assert [result["error"]["code"] for result in response.json()["data"]] == ["invalid_item"] * 2
        assert response.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}

    def test_models_are_listed_by_the_names_of_their_folders(self, loaded: ServeConfig, tmp_path: Path) -> None:
        config = ServeConfig(classifiers=(str(tmp_path / "a"), f"{tmp_path}/b/"))

        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            return await client.get("/v1/models")

        response = serve(config, work)
        assert [model["id"] for model in response.json()["data"]] == ["a", "b"]
        assert response.json()["data"][0]["label_names"] == ["0", "1"]
        assert str(tmp_path) not in response.text

    def test_the_page_for_programs_describes_the_request(self, loaded: ServeConfig) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> Any:
            return (await client.get("/openapi.json")).json()

        page = serve(loaded, work)
        assert page["paths"].keys() == {"/v1/classify", "/v1/models", "/livez", "/readyz"}
        assert "image" in json.dumps(page["paths"]["/v1/classify"]["post"]["requestBody"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "status", "code"),
        [
            (b"", 400, "invalid_json"),
            (b"{", 400, "invalid_json"),
            (b"\xff\xfe\xfd", 400, "invalid_json"),
            (b'{"input": "\xe9"}', 400, "invalid_json"),
            (b"[" * 100_000, 400, "invalid_json"),
            (b"1" * 10_000, 400, "invalid_json"),
            (b"[]", 422, "invalid_request"),
            (b"{}", 422, "invalid_request"),
            (b'{"input": []}', 422, "invalid_request"),
            (b'{"input": {"text": "secret"}}', 422, "invalid_request"),
            (b'{"input": [{"text": "a"}], "secret": 1}', 422, "invalid_request"),
            (b'{"input": [{"text": "a"}], "model": 1}', 422, "invalid_request"),
            (b'{"input": [{"text": "a"}], "model": "secret"}', 404, "model_not_found"),
            (b'{"input": [{"text": "a"}], "model": "\\ud800"}', 404, "model_not_found"),
            (b'{"input": [1, 2, 3]}', 422, "too_many_items"),
        ],
    )
    def test_requests_that_make_no_sense(self, loaded: ServeConfig, content: bytes, status: int, code: str) -> None:
        response = post(ServeConfig(classifiers=loaded.classifiers, queue_size=2), content=content)
        assert check_problem(response, status, code)
        assert "secret" not in response.text

    def test_a_name_is_needed_where_there_are_several(self, loaded: ServeConfig) -> None:
        config = ServeConfig(classifiers=("a", "b"))
        assert "/v1/models" in check_problem(post(config, **texts("x")), 422, "model_missing")
        assert post(config, json={"model": "b", "input": [{"text": "x"}]}).json()["model"] == "b"

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/v1/classify", 405), ("GET", "/docs", 404), ("POST", "/v1/classify/", 404)],
    )
    def test_other_paths_and_methods(self, loaded: ServeConfig, method: str, path: str, status: int) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            return await client.request(method, path)

        response = serve(loaded, work)
        check_problem(response, status, "not_found" if status == 404 else "method_not_allowed")
        assert ("allow" in response.headers) == (status == 405)

    def test_a_body_is_counted_while_it_is_read(self, loaded: ServeConfig) -> None:
        config = ServeConfig(classifiers=loaded.classifiers, max_body_bytes=1000)
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

    def test_a_body_that_does_not_arrive_is_not_waited_for(self, loaded: ServeConfig) -> None:
        async def stream() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        config = ServeConfig(classifiers=loaded.classifiers, deadline=0.05)
        check_problem(post(config, content=stream()), 408, "body_too_slow")


class TestOverload:
    def test_too_many_is_429_and_those_accepted_are_answered(self, loaded: ServeConfig, gate: Gate) -> None:
        config = ServeConfig(classifiers=loaded.classifiers, max_batch=1, queue_size=2)

        async def work(client: httpx.AsyncClient, _: Service) -> tuple[list[httpx.Response], list[httpx.Response]]:
            accepted = [asyncio.create_task(client.post("/v1/classify", **texts("first")))]
            await asyncio.to_thread(gate.entered.wait)
            accepted.append(asyncio.create_task(client.post("/v1/classify", **texts("second"))))
            await settle()
            refused = [await client.post("/v1/classify", **texts("a", "b"))]  # one place is free
            accepted.append(asyncio.create_task(client.post("/v1/classify", **texts("third"))))
            await settle()
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
        config = ServeConfig(classifiers=loaded.classifiers, max_batch=1, queue_size=1)

        async def work(client: httpx.AsyncClient, service: Service) -> httpx.Response:
            release = asyncio.Event()

            async def stream() -> AsyncIterator[bytes]:
                await release.wait()
                yield b"{}"

            slow = [asyncio.create_task(client.post("/v1/classify", content=stream())) for _ in range(2)]
            await settle()
            response = await client.post("/v1/classify", **texts("a"))
            release.set()
            assert [one.status_code for one in await asyncio.gather(*slow)] == [422, 422]
            assert (await client.post("/v1/classify", **texts("a"))).status_code == 200
            return response

        check_problem(serve(config, work), 429, "queue_full")

    def test_a_model_that_hangs_is_504(self, loaded: ServeConfig, gate: Gate) -> None:
        config = ServeConfig(classifiers=loaded.classifiers, deadline=0.1)
        assert check_problem(post(config, **texts("a")), 504, "deadline")

    def test_one_who_hangs_up_is_not_scored(self, loaded: ServeConfig, gate: Gate) -> None:
        """Spoken in ASGI itself, since no client of ours hangs up within one process."""
        config = ServeConfig(classifiers=loaded.classifiers, max_batch=1)

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

                scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [], "query_string": b""}
                leaving = asyncio.create_task(app(scope, receive, send))
                await settle()
                assert not leaving.done()
                hung_up.set()
                await leaving  # without waiting for the model
                last = asyncio.create_task(client.post("/v1/classify", **texts("last")))
                await settle()
                gate.open.set()
                assert (await first).status_code == (await last).status_code == 200

        run(main())
        assert gate.seen == ["first", "last"]


class TestDefects:
    SECRET = "/home/secret/model.safetensors"

    def test_a_defect_of_the_model_is_500_without_detail(
        self, loaded: ServeConfig, scoring: Callable[[Score], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(examples: Sequence[Example]) -> list[Scored]:
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

        def score(examples: Sequence[Example]) -> list[Scored]:
            for example in examples:
                if example.text in failures:
                    raise failures[example.text]
            return [
                Scored(probabilities=((0.0, float("nan") if example.text == "nan" else 1.0),), tokens=3)
                for example in examples
            ]

        scoring(score)
        response = post(loaded, **texts("a", "bug", "b", "big", "nan", "c"))
        assert response.status_code == 200
        assert "secret" not in response.text
        codes = [result.get("error", {}).get("code") for result in response.json()["data"]]
        assert codes == [None, "internal_error", None, "too_large", "internal_error", None]
        assert response.json()["usage"]["total_tokens"] == 9

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
        load, gate = service_module._load_panel, threading.Event()

        def slowly(config: ServeConfig) -> Panel:
            gate.wait(timeout=60)
            return load(config)

        monkeypatch.setattr(service_module, "_load_panel", slowly)

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
            while service.state == "loading":
                await asyncio.sleep(0.01)
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
        def fail(config: ServeConfig) -> Panel:
            raise error

        monkeypatch.setattr(service_module, "_load_panel", fail)

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
        config = ServeConfig(classifiers=loaded.classifiers, max_batch=1)

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
                await settle()
                closing = asyncio.create_task(app.state.service.close())
                await settle()
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


class TestKeys:
    KEY = "k3y-of-the-house"

    @pytest.fixture
    def locked(self, loaded: ServeConfig, tmp_path: Path) -> ServeConfig:
        path = tmp_path / "key"
        path.write_text(f"{self.KEY}\n")
        return ServeConfig(classifiers=loaded.classifiers, api_key_file=str(path), host="0.0.0.0")

    def test_every_path_but_health_asks_for_it(self, locked: ServeConfig) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> None:
            for path in ("/livez", "/readyz"):
                assert (await client.get(path)).status_code == 200
            for method, path in (
                ("POST", "/v1/classify"),
                ("POST", "/classify"),
                ("GET", "/v1/models"),
                ("GET", "/openapi.json"),
                ("GET", "/nothing/here"),
                ("GET", "/livez/"),
                ("GET", "//livez"),
                ("GET", "/LIVEZ"),
                ("GET", "/v1/models?/livez"),
                ("GET", "/livez/../v1/models"),
                ("OPTIONS", "/v1/classify"),
            ):
                response = await client.request(
                    method, path, headers={"Host": "test/livez", "X-Forwarded-Path": "/livez"}
                )
                check_problem(response, 401, "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"

        serve(locked, work)

    @pytest.mark.parametrize(
        "given",
        [
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic k3y-of-the-house",
            "k3y-of-the-house",
            "Bearer k3y-of-the-housE",
            "Bearer k3y-of-the-house2",
            "Bearer k\u00e9y",
        ],
    )
    def test_a_wrong_key_is_refused_and_never_repeated(self, locked: ServeConfig, given: str) -> None:
        response = post(locked, **texts("a"), headers={"Authorization": given.encode()})
        check_problem(response, 401, "invalid_api_key")
        assert self.KEY not in response.text
        assert "wrong" not in response.text

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_the_key_opens(self, locked: ServeConfig, scheme: str) -> None:
        response = post(locked, **texts("a"), headers={"Authorization": f"{scheme} {self.KEY}"})
        assert response.status_code == 200
        assert self.KEY not in response.text

    @pytest.mark.parametrize("keys", [("wrong", KEY), (KEY, "wrong")])
    def test_two_keys_are_none(self, locked: ServeConfig, keys: tuple[str, str]) -> None:
        headers = [("Authorization", f"Bearer {key}") for key in keys]
        check_problem(post(locked, **texts("a"), headers=headers), 401, "invalid_api_key")

    @pytest.mark.parametrize("content", [None, b"", b" \n", b"two words\n", b"two\nlines\n"])
    def test_a_file_without_a_key_is_an_error_at_once(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "key"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match="api_key_file") as caught:
            create_app(ServeConfig(classifiers=("a",), api_key_file=str(path)))
        assert "two" not in str(caught.value)


class TestConfiguration:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "example.org", "localhost.example.org"])
    def test_an_open_door_must_be_asked_for(self, host: str) -> None:
        with pytest.raises(ConfigError, match="--api-key-file"):
            ServeConfig(host=host)
        assert ServeConfig(host=host, insecure=True).host == host
        assert ServeConfig(host=host, api_key_file="key").host == host

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_needs_no_key(self, host: str) -> None:
        assert ServeConfig(host=host).host == host

    @pytest.mark.parametrize(
        "option",
        [
            {"port": -1},
            {"port": 65536},
            {"max_batch": 0},
            {"queue_size": 0},
            {"deadline": 0.0},
            {"deadline": float("nan")},
            {"deadline": float("inf")},
            {"max_body_bytes": 0},
            {"max_text_chars": 0},
        ],
    )
    def test_options_out_of_range(self, option: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(option))):
            ServeConfig(**option)

    def test_names_must_differ_and_exist(self) -> None:
        with pytest.raises(ConfigError, match="no classifiers"):
            create_app(ServeConfig())
        with pytest.raises(ConfigError, match="'best'; rename"):
            create_app(ServeConfig(classifiers=("a/best", "b/best")))

    def test_building_imports_no_model_and_a_missing_extra_is_named(self) -> None:
        program = """
import sys
from qwen_vl_classifier import ServeConfig, create_app
create_app(ServeConfig(classifiers=("a",)))
print(sorted({"torch", "transformers"} & sys.modules.keys()))
for name in [name for name in sys.modules if name.startswith(("fastapi", "qwen_vl_classifier"))]:
    del sys.modules[name]
sys.modules["fastapi"] = None  # as if it were not installed
try:
    from qwen_vl_classifier import create_app
except ImportError as error:
    print(type(error).__name__, error)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        assert done.stdout.splitlines() == [
            "[]",
            "MissingExtraError fastapi is not installed; run: pip install 'qwen-vl-classifier[serve]'",
        ]
