"""`serve`: answer requests over HTTP until told to stop."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket

from qwen_vl_classifier.config import ServeConfig, add_flags, from_flags
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.extras import require

_SECONDS_TO_SEND = 5  # after the deadline, for answers on their way


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "serve",
        help="serve saved classifiers over HTTP",
        description="Serve saved classifiers over HTTP: POST /v1/classify, GET /v1/models, /livez and /readyz. "
        "Classifiers that share a backbone share its passes. SIGTERM finishes what was accepted, then exits with 0.",
    )
    parser.add_argument(
        "classifiers", nargs="+", metavar="CLASSIFIER", help="folder of a saved classifier, served by its name"
    )
    add_flags(parser, ServeConfig)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Serve until SIGTERM or an interrupt; print the address once it is taken."""
    config = from_flags(ServeConfig, flags, classifiers=tuple(flags.classifiers))
    for module in ("fastapi", "uvicorn"):
        require(module, extra="serve")
    import uvicorn

    from qwen_vl_classifier.serving.app import create_app

    failures: list[Exception] = []

    def stop(failure: Exception | None = None) -> None:
        if failure is not None:
            failures.append(failure)
        server.should_exit = True

    app = create_app(config, on_failure=stop)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_level="warning",
            ws="none",
            proxy_headers=False,  # who calls is never decided by a header
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.deadline) + _SECONDS_TO_SEND,
        )
    )
    with _listening(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"serving {', '.join(app.state.service.names)} at http://{_in_url(host)}:{port}", flush=True)
        # The server finishes in order and then raises SIGTERM once more, for whoever handled it before. By default
        # that ends the process with a signal, not with 0.
        previous = signal.signal(signal.SIGTERM, lambda *_: stop())
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, previous)
    if failures:
        raise failures[0]
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """Take an address, so that one which is not free is an error of one line.

    Raises:
        ConfigError: It cannot be taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        # The text of an error number of the system, without what `create_server` adds; names have numbers of their own.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror
        raise ConfigError(
            f"host {host!r}, port {port}: cannot listen there ({reason}); give an address of this machine and a port "
            "that is free"
        ) from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
