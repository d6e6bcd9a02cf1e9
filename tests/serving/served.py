"""A real application over saved classifiers, and requests as clients spell them."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.testclient import TestClient

from qwen_vl_classifier import Classifier, ServeConfig, Tap, create_app
from tests.waiting import LIMIT, until

NAMES = ("first", "second")


@dataclass(frozen=True, slots=True)
class Served:
    """Classifiers, offline and behind an application that runs in a thread of its own."""

    client: TestClient
    classifiers: dict[str, Classifier]
    config: ServeConfig

    def post(self, path: str, body: Any, **request: Any) -> httpx.Response:
        """Send JSON as Python spells it, half surrogate pairs included."""
        headers = {"Content-Type": "application/json", **request.pop("headers", {})}
        response: httpx.Response = self.client.post(path, content=json.dumps(body), headers=headers, **request)
        return response


def save_two(folder: Path, classifier: Classifier) -> dict[str, Classifier]:
    """Save a classifier, and one with another tap, temperature and threshold."""
    other = copy.copy(classifier)
    other.tap, other.temperature, other.threshold = Tap(2, "last"), 0.3, 0.4
    other.label_names = ("no tower", "tower")
    other.training = {**classifier.training, "text": "Is there a tower?"}
    classifiers = dict(zip(NAMES, (classifier, other), strict=True))
    for name, one in classifiers.items():
        one.save(folder / name)
    return classifiers


@contextlib.contextmanager
def ready_client(config: ServeConfig) -> Iterator[TestClient]:
    """Run an application until it is ready, and give a client of it."""
    app = create_app(config)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        until(lambda: app.state.service.state not in ("loading", "warming"), "a service that is ready")
        assert app.state.service.state == "ready"
        yield client


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[str]:
    """Run an application behind a real socket in a thread, until it is ready; give its address."""
    app = create_app(config)
    # Without its own configuration of logs, which would outlive the server.
    server = uvicorn.Server(
        uvicorn.Config(
            app, lifespan="on", log_config=None, ws="none", server_header=False, timeout_keep_alive=int(LIMIT)
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            until(lambda: app.state.service.state == "ready", "a service that is ready")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(LIMIT)
    assert not thread.is_alive()
