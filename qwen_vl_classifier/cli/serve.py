"""`serve`: answer requests over HTTP until told to stop."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.config.device_lists import ALL_DEVICES, listed_devices
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import QwenVLClassifierError
from qwen_vl_classifier.extras import require

EXIT_FAILURE = 1
"""The status when the server failed, or cut requests off, for whoever starts it again."""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "serve",
        help="answer requests over HTTP, with a web page to try the classifier",
        description="Serve saved classifiers and panels over HTTP. The address / is a page to try them, /docs "
        "describes the API.",
        details="Classifiers on the same backbone are computed together. On SIGTERM or SIGHUP, accepted requests are "
        "finished and the exit status is 0; a second signal ends the server at once. With --ray-address, the command "
        "returns and the cluster goes on serving.",
        usage="%(prog)s [CLASSIFIER ...] [options]",
        example="qwen-vl-classifier serve demo/classifier",
    )
    parser.add_argument(
        "classifiers",
        nargs="*",
        metavar="CLASSIFIER",
        help="folder of a saved classifier or panel; requests name it by the folder's name",
    )
    add_flags(parser, ServeConfig)
    parser.set_defaults(run=run)


class _Announcements:
    """The lines on standard output: the address while the classifiers load, again once ready, and the end.

    Args:
        what: What is served.
        url: The address.
        out: Where to print.
    """

    def __init__(self, what: str, url: str, out: TextIO) -> None:
        self._what, self._url, self._out = what, url, out
        self._began = time.monotonic()

    def loading(self) -> None:
        """Say that health checks are answered."""
        self._print(f"loading {self._what} at {self._url}")

    def ready(self) -> None:
        """Say that requests are answered; on a terminal, also what to do next."""
        self._print(f"ready: {self._what} at {self._url}")
        if self._out.isatty():
            self._print(f"  try it in a browser: {self._url}/\n  use it from a program: {self._url}/docs")
            self._print("  stop it: Ctrl+C")

    def stopped(self, answered: int | None) -> None:
        """Say how long it ran, and how many requests of the API it answered where that is known."""
        requests = "" if answered is None else f"answered {answered:,} {'request' if answered == 1 else 'requests'}, "
        self._print(f"stopped: {requests}ran for {_duration(time.monotonic() - self._began)}")

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(line, file=self._out, flush=True)


def _duration(seconds: float) -> str:
    """Write a number of seconds for people, in two units at most."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    while len(units) > 1 and not units[0][0]:
        units.pop(0)
    return " ".join(f"{number} {unit}" for number, unit in units[:2])


def run(flags: argparse.Namespace) -> int:
    """Serve until SIGTERM or an interrupt; print the address while loading and once ready, and a line at the end."""
    config = from_flags(ServeConfig, flags, classifiers=tuple(flags.classifiers))
    for module in ("fastapi", "uvicorn", "httptools"):
        require(module, extra="serve")

    from qwen_vl_classifier.serving.http.listening import listening
    from qwen_vl_classifier.serving.models.served_folders import served_folders
    from qwen_vl_classifier.serving.observability.logs import chosen_format, logging_to_stderr

    # Once for all processes: standard error of a replica is no terminal, even where its lines reach one.
    config = dataclasses.replace(config, log_format=chosen_format(config.log_format, sys.stderr))
    devices = _devices(config.device)
    out = sys.stdout  # Ray's own lines are kept out of it
    with logging_to_stderr(config.log_format), contextlib.ExitStack() as stack:
        listener = None
        host, port = config.host, config.port
        if not config.ray_address:  # else the machines of the cluster listen
            listener = stack.enter_context(listening(host, port))
            host, port = listener.getsockname()[:2]
        url = f"{'https' if config.tls_certificate else 'http'}://{_in_url(host)}:{port}"
        names = [*served_folders(config), *([f"what {config.watch} holds"] if config.watch else [])]
        announcements = _Announcements(", ".join(names) or "nothing yet", url, out)
        try:
            if config.engine == "ray":
                from qwen_vl_classifier.serving.cluster.deploying import serve_on_ray

                stack.close()  # the address is free, and Ray's proxy takes it
                on_ray = dataclasses.replace(config, port=port)
                begins = {"announce": announcements.loading, "on_ready": announcements.ready}
                if config.ray_address:  # the cluster goes on
                    return serve_on_ray(on_ray, **begins)
                return _to_the_end(lambda: serve_on_ray(on_ray, **begins), lambda: announcements.stopped(None))
            assert listener is not None
            return _run(config, devices, listener, announcements)
        except QwenVLClassifierError:
            raise
        except Exception as error:
            # The log has the traceback; this line is for a person who looks at the end of it.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"qwen-vl-classifier serve: the server failed ({reason}); see its log", file=sys.stderr)
            return EXIT_FAILURE


def _devices(device: str) -> tuple[str, ...]:
    """Return the devices to serve on, one process for each.

    Raises:
        ConfigError: All GPUs are meant, and there is none.
    """
    if device != ALL_DEVICES:
        return listed_devices(device)
    from qwen_vl_classifier.backbone.devices import every_gpu  # brings torch

    return tuple(every_gpu())


def _run(config: ServeConfig, devices: Sequence[str], listener: socket.socket, announcements: _Announcements) -> int:
    """Serve in this process, or in one for each of several devices, and return the exit status."""
    announce, on_ready = announcements.loading, announcements.ready
    if len(devices) > 1:
        from qwen_vl_classifier.serving.replicas.supervisor import Supervisor

        supervisor = Supervisor(config, listener, devices)
        return _to_the_end(
            lambda: supervisor.run(announce=announce, on_ready=on_ready),
            lambda: announcements.stopped(supervisor.answered_requests),
        )
    from qwen_vl_classifier.serving.app import create_app
    from qwen_vl_classifier.serving.http.server import Server

    server = Server(config, listener)
    app = create_app(dataclasses.replace(config, device=devices[0]), on_ready=on_ready, on_failure=server.fail)
    return _to_the_end(
        lambda: server.run(app, announce=announce),
        lambda: announcements.stopped(app.state.metrics.answered_requests()),
    )


def _to_the_end(serve: Callable[[], int], stopped: Callable[[], None]) -> int:
    """Serve, and call `stopped` after an orderly end, which an interrupt is too; return the exit status."""
    try:
        status = serve()
    except KeyboardInterrupt:
        stopped()
        raise
    stopped()
    return status


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
