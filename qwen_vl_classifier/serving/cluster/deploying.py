"""Serve on Ray: on one that is started here and ends with this process, or on a cluster that goes on without it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import psutil

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ConfigError, StoppedError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.scoring.ray import Pool, connected
from qwen_vl_classifier.serving.cluster.application import APPLICATION, CLOSE_SECONDS, DEPLOYMENT, application
from qwen_vl_classifier.serving.cluster.proxy_layers import variables
from qwen_vl_classifier.serving.http.access import read_key
from qwen_vl_classifier.serving.http.server import tls_context

CUT_OFF = 1
"""The exit status when requests had to be cut off."""

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CLUSTER_PROCESSES = frozenset({"gcs_server", "raylet"})  # without which nothing goes on
_TICK = 0.2  # seconds between two looks
_TRANSIT_SECONDS = 0.5  # for answers on their way through the proxy
_CONNECTION_SECONDS = 5  # that an idle connection stays open
_OWN_LOGS = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
_ERROR = re.compile(r"qwen_vl_classifier\.errors\.(\w+): (.+)")

_log = logging.getLogger(__name__)


def serve_on_ray(
    config: ServeConfig, *, announce: Callable[[], None] = lambda: None, on_ready: Callable[[], None] = lambda: None
) -> int:
    """Serve classifiers on Ray, until a signal comes or, on a cluster, until they answer.

    On a cluster that serves classifiers already, this is a rolling update: a replica of the old version ends once one
    of the new version is ready.

    Args:
        config: What to serve and how.
        announce: Called once the proxies listen.
        on_ready: Called once requests are answered by the new version alone.

    Returns:
        The exit status.

    Raises:
        ConfigError: The cluster cannot be reached or serves otherwise, or the classifiers cannot be loaded.
        KeyboardInterrupt: After SIGINT, once all is finished.
        MissingExtraError: The extras "serve" and "scale" are not installed.
        RuntimeError: The cluster has gone, or replicas do not start.
    """
    locked = read_key(config) is not None
    tls_context(config)  # a certificate that cannot be used is told here, not by the proxy
    environment = variables(config)
    pool = Pool(workers=1, address=config.ray_address, cpus=os.cpu_count() or 1)
    with (
        _signals(config) as caught,
        connected(pool, logs=not config.ray_address, variables={**environment, **_OWN_LOGS}) as ray,
    ):
        own = [] if config.ray_address else _cluster_processes()
        serve = require("ray.serve", extra="scale")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _start(serve, config, environment)
        announce()
        try:
            _deploy(serve, application(config, locked=locked), lambda: _check(caught, own))
            on_ready()
            while not config.ray_address:
                time.sleep(_TICK)
                _check(caught, own)
        except StoppedError:
            return _finish(serve, ray, config, caught[0])
    return 0


def _start(serve: Any, config: ServeConfig, environment: dict[str, str]) -> None:
    """Start Serve, or make sure that it listens where it should.

    Raises:
        ConfigError: It listens elsewhere already.
    """
    from ray.serve.context import _get_global_client

    http = {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.deadline,
        "keep_alive_timeout_s": _CONNECTION_SECONDS,
        "ssl_certfile": config.tls_certificate or None,
        "ssl_keyfile": config.tls_key or config.tls_certificate or None,
    }
    serve.start(
        http_options=http,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        controller_options={"runtime_env": {"env_vars": environment}} if config.ray_address else None,
    )
    client: Any = _get_global_client()
    for name, value in http.items():
        seen = getattr(client.http_config, name)
        if seen != value:
            raise ConfigError(
                f"Ray Serve runs on this cluster already, with {name} {seen!r} instead of {value!r}; give the same, or "
                "end it with `serve shutdown`"
            )


def _deploy(serve: Any, target: Any, check: Callable[[], None]) -> None:
    """Deploy, and return once the new version alone answers.

    Raises:
        ConfigError: A replica says that an option or a folder is wrong.
        RuntimeError: Replicas do not start.
    """
    run_target = serve.api.RunTarget(target, name=APPLICATION, route_prefix="/")
    serve.run_many([run_target], wait_for_applications_running=False)
    while True:
        check()
        found = serve.status().applications[APPLICATION]
        deployment = found.deployments.get(DEPLOYMENT)
        if found.status == "RUNNING":
            return
        if found.status == "DEPLOY_FAILED":
            told = f"{found.message}\n{deployment.message if deployment else ''}"
            if expected := _ERROR.findall(told):
                raise ConfigError(expected[-1][1])
            raise RuntimeError(f"replicas do not start: {told.strip().splitlines()[-1]}")
        time.sleep(_TICK)


def _finish(serve: Any, ray: Any, config: ServeConfig, number: int) -> int:
    """Let replicas answer what they have accepted, then return the exit status."""
    begun = time.monotonic()
    with contextlib.suppress(ray.exceptions.RayError):
        serve.delete(APPLICATION, _blocking=False)  # by itself, it would wait for a minute at most
        while APPLICATION in serve.status().applications:
            time.sleep(_TICK)
    status = 0
    if time.monotonic() - begun > config.grace:
        _log.error("requests were cut off after %g seconds of grace", config.grace)
        status = CUT_OFF
    time.sleep(_TRANSIT_SECONDS)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    return status


def _check(caught: list[int], own: list[psutil.Process]) -> None:
    """Raise what ends this process."""
    if caught:
        raise StoppedError("a signal came")
    for process in own:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError("the Ray cluster on this machine has ended; start the server again")


def _cluster_processes() -> list[psutil.Process]:
    """Return the processes of the cluster that was started here."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name() in _CLUSTER_PROCESSES]


@contextlib.contextmanager
def _signals(config: ServeConfig) -> Iterator[list[int]]:
    """Put the first signal in the list that is given; end the process at the second, or if its end takes too long."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        timer = threading.Timer(config.grace + 3 * CLOSE_SECONDS, os._exit, (CUT_OFF,))
        timer.daemon = True
        timer.start()

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {
        number: signal.signal(number, note)
        for number in _ENDING
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
