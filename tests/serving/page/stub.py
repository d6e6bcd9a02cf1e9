"""A server for the tests of the page: the real page routes beside a stub of the routes that it calls.

The stub answers in the shapes of the real ones, behaves as it is told, and keeps the requests.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import io
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.serving.routes import page
from tests.waiting import LIMIT, until

MILLISECONDS = 1000 * LIMIT
"""The limit of waits, as browsers count."""

PATCHES = [[0.1 * (column - 2) * (row + 1) for column in range(6)] for row in range(4)]
"""What every picture is explained by: blue on the left, orange on the right, strongest at the foot."""


def model(name: str, *, labels: tuple[str, str] = ("denied", "approved"), **more: Any) -> dict[str, Any]:
    """Describe a classifier as /v1/models does."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "qwen-vl-classifier",
        "version": "0123456789ab",
        "label_names": list(labels),
        "text": None,
        "threshold": 0.5,
        "abstention": None,
        **more,
    }


def panel(name: str, labels: Sequence[str], *, one_of: bool = False) -> dict[str, Any]:
    """Describe a panel as /v1/models does."""
    kept = ("id", "label_names", "threshold", "abstention")
    described = [{key: model(f"{name}/{label}", labels=("0", "1"))[key] for key in kept} for label in labels]
    listed = [{**one, "name": label} for one, label in zip(described, labels, strict=True)]
    own = {key: model(name)[key] for key in ("id", "object", "created", "owned_by", "version", "text")}
    return {**own, "one_of": one_of, "labels": listed}


@dataclass
class StubServer:
    """What the stub serves and how it behaves.

    Attributes:
        models: As `/v1/models` lists them.
        scores: The probability that each gives.
        refusals: For each route a list of (status, problem, headers) that come first, one for each request.
        key: Wanted as the password of Basic or as bearer token, if any.
        gate: `/v1/classify` waits for it.
        requests: The bodies that came, by route, in their order.
        most_at_a_time: How many requests to `/v1/classify` were in progress at the same time, at most.
    """

    models: list[dict[str, Any]] = field(default_factory=lambda: [model("claims")])
    scores: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, list[tuple[int, Any, dict[str, str]]]] = field(default_factory=dict)
    key: str = ""
    gate: threading.Event = field(default_factory=threading.Event)
    requests: dict[str, list[Any]] = field(default_factory=dict)
    at_a_time: int = 0
    most_at_a_time: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def refuse(self, route: str, status: int, code: str, detail: str, **headers: str) -> None:
        """Have the next request of a route refused."""
        error = {"message": detail, "type": "server_error", "param": None, "code": code}
        content = {"type": "about:blank", "title": "No", "status": status, "detail": detail, "error": error}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.refusals.setdefault(route, []).append((status, content, named))

    def result(self, name: str, text: str, *, several: bool) -> dict[str, Any]:
        """Answer for one classifier."""
        found = next(entry for entry in self.models if entry["id"] == name)
        named = {"model": name} if several else {}
        if "bad item" in text:
            return {"index": 0, **named, "error": {"code": "image_damaged", "status": 422, "message": "cannot be read"}}
        if "labels" in found:
            return {"index": 0, **named, **self._panel_result(found)}
        score = self.scores.get(name, 0.873)
        label = int(score >= found["threshold"])
        band = found["abstention"]
        decision = "abstain" if band and band[0] <= score <= band[1] else ("no", "yes")[label]
        return {
            "index": 0,
            **named,
            "label": label,
            "probs": [1 - score, score],
            "score": score,
            "threshold": found["threshold"],
            "decision": decision,
        }

    def _panel_result(self, found: dict[str, Any]) -> dict[str, Any]:
        scores = {label["name"]: self.scores.get(label["id"], 0.1) for label in found["labels"]}
        if found["one_of"]:
            likeliest = max(scores, key=scores.__getitem__)
            return {"class": likeliest, "probability": scores[likeliest], "probabilities": scores}
        decisions = {
            name: {
                "label": int(score >= 0.5),
                "score": score,
                "threshold": 0.5,
                "decision": ("no", "yes")[score >= 0.5],
            }
            for name, score in scores.items()
        }
        return {"labels": decisions}


@functools.cache
def description(locked: bool) -> dict[str, Any]:
    """Describe the real application, with or without a key."""
    app = create_app(ServeConfig(classifiers=("claims",)))
    app.state.locked = locked
    return app.openapi()


def make_app(stub: StubServer, config: ServeConfig, *, locked: bool = False) -> FastAPI:
    """Make the application: real pages, stubbed routes."""
    app = FastAPI(title="stub", docs_url=None, redoc_url=None)
    app.openapi = lambda: description(locked)  # type: ignore[method-assign]
    app.state.service = SimpleNamespace(config=config)
    app.state.locked = locked
    app.include_router(page.router)

    @app.middleware("http")
    async def check(request: Request, proceed: Any) -> Response:
        if stub.key and not _has_key(request, stub.key):
            stub.refuse("401", 401, "invalid_api_key", "no valid key")
            status, content, _ = stub.refusals["401"].pop()
            challenge = {"WWW-Authenticate": 'Basic realm="stub"'}
            return JSONResponse(content, status, challenge, media_type="application/problem+json")
        waiting = stub.refusals.get(request.url.path)
        if waiting:
            status, content, headers = waiting.pop(0)
            return JSONResponse(content, status, headers, media_type="application/problem+json")
        answer: Response = await proceed(request)
        return answer

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": stub.models}

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        if request.headers["content-type"].startswith("multipart/form-data"):
            body = await _read_form(request)
        else:
            body = await request.json()
            (item,) = body["input"]
            images = [_digest(base64.b64decode(image.partition(",")[2])) for image in item.get("image") or []]
            body = {"model": body.get("model"), "text": item["text"], "images": images}
        stub.requests.setdefault("classify", []).append(body)
        stub.at_a_time += 1
        stub.most_at_a_time = max(stub.most_at_a_time, stub.at_a_time)
        while not stub.gate.is_set():
            await asyncio.sleep(0.01)
        stub.at_a_time -= 1
        several = isinstance(body["model"], list)
        names = body["model"] if several else [body["model"] or stub.models[0]["id"]]
        return {
            "id": "classify-1",
            "object": "list",
            "created": 0,
            "model": body["model"] or names[0],
            "version": ["0123456789ab" for _ in names] if several else "0123456789ab",
            "data": [stub.result(name, body["text"], several=several) for name in names],
            "usage": {"prompt_tokens": 132, "total_tokens": 132},
        }

    @app.post("/v1/explain")
    async def explain(request: Request) -> dict[str, Any]:
        body = await request.json()
        stub.requests.setdefault("explain", []).append(body)
        words = body["text"].split()
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), "grey").save(picture, "PNG")
        return {
            "model": body["model"],
            "probability": 0.873,
            "decision": "yes",
            "log_odds": 1.93,
            "unit": "log odds",
            "method": "gradients",
            "exact": False,
            "words": [{"word": word, "contribution": (-1) ** i * 0.5 / (i + 1)} for i, word in enumerate(words)],
            "patches": [PATCHES for _ in body["image"] or []],
            "template": 0.1,
            "rest": -0.2,
            "baseline": "average",
            "summary": ["squares explain the difference from the average training picture"],
            "heat_map": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
        }

    return app


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port of this machine, and give its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_keep_alive=int(LIMIT), timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), "a server that has started")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


async def _read_form(request: Request) -> dict[str, Any]:
    async with request.form() as form:
        names = [str(name) for name in form.getlist("model")]
        return {
            "model": names if len(names) > 1 else names[0] if names else None,
            "text": form["text"],
            "images": [_digest(await image.read()) for image in form.getlist("image") if not isinstance(image, str)],
        }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _has_key(request: Request, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme == "Basic":
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(given).decode().partition(":")[2] == key
    return (scheme, given) == ("Bearer", key)
