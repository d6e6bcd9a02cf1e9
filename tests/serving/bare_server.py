"""A server with nothing behind it, for tests of connections and of the end: run as a script with its options in JSON.

Keys are options of `ServeConfig`, names of constants of the server's two modules, the number of `files` that it may
have, or what goes wrong: `hang` or `unstartable`. Nobody meets a time limit by being slow: SIGUSR1 puts the clock
forward by one step, which is less than any limit that is not given, and two steps are more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable

import psutil
from fastapi import FastAPI, Request, Response

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.serving.http import connections, parsing
from qwen_vl_classifier.serving.http import server as server_module
from qwen_vl_classifier.serving.observability.logs import logging_to_stderr
from qwen_vl_classifier.serving.observability.middleware import Observability
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from tests.serving.clock import Clock
from tests.waiting import LIMIT

STEP = 4 * LIMIT
"""Seconds that one signal puts the clock forward: beyond what any test lasts."""

_PATIENT = dict.fromkeys(
    ("header_timeout", "body_timeout", "grace", "_LINGER_SECONDS", "_UNREAD_SECONDS", "_TRANSIT_SECONDS"),
    1.5 * STEP,
)


parsed_parts = 0
"""How often the parser called for a part of a body or a header."""


def count_parts() -> None:
    """Count calls of the parser, each of which costs what a hundred bytes do."""

    def counted(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            global parsed_parts
            parsed_parts += 1
            method(*arguments)

        return call

    for name in ("on_body", "on_header"):
        setattr(parsing.HttpParser, name, counted(getattr(parsing.HttpParser, name)))


class Service:
    """What the server asks of a service."""

    draining = False
    accepted = 0

    def drain(self) -> None:
        self.draining = True


def make_app(options: dict[str, object], server: server_module.Server) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        clock = Clock()
        app.state.steps = 0

        def step() -> None:
            clock.ahead += STEP
            app.state.steps += 1

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, step)
        if options.get("hang"):  # as a library does that is asked to load weights for a minute
            asyncio.get_running_loop().run_in_executor(None, time.sleep, STEP)
        if options.get("unstartable"):
            raise OSError("no room for decoders")
        yield

    app = FastAPI(lifespan=lifespan)
    app.state.metrics = Metrics()
    app.state.service = service = Service()
    app.add_middleware(Observability, metrics=app.state.metrics)

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response(status_code=503 if service.draining else 200)

    @app.get("/livez")
    async def livez() -> Response:
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        own = b"accepted %d\nsteps %d\nparsed %d\n" % (service.accepted, app.state.steps, parsed_parts)
        return Response(app.state.metrics.exposition()[0] + own)

    @app.get("/delays")
    async def delays() -> list[bool]:
        """Tell of each connection whether the system may hold back a small packet for another."""
        open_ones = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
        found = []
        for one in open_ones:
            with socket.socket(fileno=os.dup(one.fd)) as connection:
                found.append(not connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return found

    @app.get("/echo/{path:path}")
    async def echo(path: str) -> dict[str, str]:
        return {"path": path}

    @app.get("/host/{path:path}")
    async def host(request: Request, path: str) -> dict[str, object]:
        return {"path": path, "query": request.url.query, "hosts": request.headers.getlist("host")}

    @app.post("/trailers")
    async def trailers(request: Request) -> dict[str, object]:
        body = await request.body()
        return {"body": body.decode(), "headers": sorted(name.decode() for name, _ in request.scope["headers"])}

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(50_000_000))

    @app.post("/unread")
    async def unread() -> Response:
        return Response(status_code=413)

    @app.post("/work")
    async def work(request: Request, seconds: float = 0.01) -> Response:
        if service.draining:
            return Response(status_code=503)
        service.accepted += 1
        body = await request.body()
        await asyncio.sleep(seconds)
        return Response(body)

    @app.post("/gone")
    async def gone(request: Request) -> Response:
        await request.body()
        service.accepted += 1
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response()

    @app.post("/fail")
    async def fail() -> Response:
        server.fail(RuntimeError("the loop died"))
        return Response()

    return app


def main() -> int:
    options = _PATIENT | json.loads(sys.argv[1])
    config = {name: value for name, value in options.items() if name in ServeConfig.__dataclass_fields__}
    for module in (connections, server_module):
        for name in options.keys() & vars(module).keys():
            setattr(module, name, options[name])
    if "files" in options:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, options["files"]))
    count_parts()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = server_module.Server(ServeConfig(classifiers=("claims",), **config), listener)
    app = make_app(options, server)
    scheme = "https" if options.get("tls_certificate") else "http"
    url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    with logging_to_stderr("json"):
        try:
            return server.run(app, announce=lambda: print(f"serving claims at {url}", flush=True))
        except (RuntimeError, OSError) as error:
            print(error, file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
