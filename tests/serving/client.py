"""What the tests of the application share: clients without a socket, pictures, and a pass that waits."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI
from PIL import Image

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving.items import Item, ItemError, ItemResult
from qwen_vl_classifier.serving.service import Service
from tests.waiting import run, soon

T = TypeVar("T")

Score = Callable[[Sequence[str]], Sequence[float]]
"""What stands for a model: texts to probabilities of class 1."""


async def waiting(service: Service, items: int) -> None:
    """Return when so many items wait for a pass: texts and pictures come that far through threads."""
    await soon(lambda: service.batcher.waiting == items, f"{items} items that wait")


async def classify(
    service: Service, items: Sequence[Item | ItemError], models: Sequence[str]
) -> list[ItemResult | ItemError]:
    """Let a request in and answer it."""
    with service.admission.admit() as request:
        return await service.classify(items, models, request, service.served)


async def explain_item(service: Service, item: Item, model: str, method: Any) -> Any:
    """Let a request in and explain its item."""
    with service.admission.admit() as request:
        return await service.explain(item, model, method, request, service.served)


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
        if state:
            await soon(lambda: app.state.service.state == state, f"the state {state}")
        # Defects become answers, as under a real server.
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
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


class DecoderHere:
    """Stands for the pool of decoders where a test is not about it: no processes to start."""

    def __init__(self, *, limits: ImageLimits, **_: Any) -> None:
        self.limits = limits

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
        return await asyncio.to_thread(open_image, data, limits=self.limits)


class Gate:
    """A model that says one half, takes down the texts it saw, and can be held shut."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, words: Sequence[str]) -> list[float]:
        self.seen += words
        self.entered.set()
        self.open.wait()
        return [0.5] * len(words)


def texts(*words: str) -> dict[str, Any]:
    return {"json": {"input": [{"text": word} for word in words]}}
