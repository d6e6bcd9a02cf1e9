"""Serve on Ray: on one that is started here and ends with this process, or on a cluster that continues without it."""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import os
import re
import signal
import ssl
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
from qwen_vl_classifier.serving.cluster.application import APPLICATION, CLOSE_SECONDS, application
from qwen_vl_classifier.serving.cluster.proxy_layers import CALLBACK, CALLBACK_VARIABLE, variables
from qwen_vl_classifier.serving.http.access import read_key
from qwen_vl_classifier.serving.http.server import tls_context

CUT_OFF = 1
"""The exit status when requests had to be cut off."""

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CLUSTER_PROCESSES = frozenset({"gcs_server", "raylet"})  # without which nothing goes on
_TICK = 0.2  # seconds between two looks
_TRANSIT_SECONDS = 0.5  # for answers on their way through the proxy
_CONNECTION_SECONDS = 5  # that an idle connection stays open
_PATIENCE = 60.0  # seconds after which the log says what is waited for
_PROBE_SECONDS = 5.0
_OWN_LOGS = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
_ERROR = re.compile(r"qwen_vl_classifier\.errors\.(\w+): (.+)")

_log = logging.getLogger(__name__)


def serve_on_ray(
    config: ServeConfig, *, announce: Callable[[], None] = lambda: None, on_ready: Callable[[], None] = lambda: None
) -> int:
    """Serve classifiers on Ray, until a signal arrives or, on a cluster, until they answer.

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
            deploy(serve, application(config, locked=locked), lambda: _check(caught, own))
            on_ready()
            while not config.ray_address:
                time.sleep(_TICK)
                _check(caught, own)
        except StoppedError:
            if config.ray_address:
                _log.warning("stopped waiting; the cluster continues with what was deployed")
                return 128 + caught[0]
            return _finish(serve, ray, config, caught[0])
    return 0


def _start(serve: Any, config: ServeConfig, environment: dict[str, str]) -> None:
    """Start Serve, or make sure that it listens where it should.

    Raises:
        ConfigError: It listens elsewhere already.
    """
    from ray.serve.context import _get_global_client

    listening = {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.deadline,
        "keep_alive_timeout_s": _CONNECTION_SECONDS,
        "ssl_certfile": config.tls_certificate or None,
        "ssl_keyfile": config.tls_key or config.tls_certificate or None,
    }
    serve.start(
        http_options=listening,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        controller_options={"runtime_env": {"env_vars": environment}} if config.ray_address else None,
    )
    client: Any = _get_global_client()
    for name, value in listening.items():
        seen = getattr(client.http_config, name)
        if seen != value:
            raise ConfigError(
                f"Ray Serve already runs on this cluster, with {name} {seen!r} instead of {value!r}; give the same, or "
                "end it with `serve shutdown`"
            )
    if _lacks_layers(config):
        raise ConfigError(
            "Ray Serve already runs on this cluster, and its proxies lack the limits of this package; end it with "
            f"`serve shutdown`, or set {CALLBACK_VARIABLE}={CALLBACK} before `ray start`"
        )


def _lacks_layers(config: ServeConfig) -> bool:
    """Tell whether a proxy that can be reached from here was started without the layers of this package."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104
    if config.tls_certificate:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host,
            config.port,
            timeout=_PROBE_SECONDS,
            context=ssl._create_unverified_context(),  # noqa: S323 - nothing secret is said, whoever listens
        )
    else:
        connection = http.client.HTTPConnection(host, config.port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/-/healthz")
        return connection.getresponse().headers["X-Content-Type-Options"] is None
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def deploy(serve: Any, target: Any, check: Callable[[], None]) -> None:
    """Deploy an application, and return once its new version alone answers.

    Args:
        serve: The module `ray.serve`.
        target: The application.
        check: Called again and again; raises what ends the wait.

    Raises:
        ConfigError: A replica says that an option or a folder is wrong.
        RuntimeError: Replicas do not start.
    """
    check()
    run_target = serve.api.RunTarget(target, name=APPLICATION, route_prefix="/")
    serve.run_many([run_target], wait_for_applications_running=False)
    patience = time.monotonic() + _PATIENCE
    while (found := serve.status().applications[APPLICATION]).status != "RUNNING":
        deployments = list(found.deployments.values())  # one at most
        if found.status == "DEPLOY_FAILED":
            told = "\n".join([found.message, *(deployment.message for deployment in deployments)])
            if expected := _ERROR.findall(told):
                raise ConfigError(expected[-1][1])
            raise RuntimeError(f"replicas do not start: {told.strip().splitlines()[-1]}")
        if time.monotonic() > patience:
            patience = math.inf
            states = [f"{count} {state.lower()}" for one in deployments for state, count in one.replica_states.items()]
            _log.warning(
                "replicas are not ready after %g s (%s); waiting: each needs a free GPU if the cluster has GPUs, and "
                "replicas of an older version stop last",
                _PATIENCE,
                ", ".join(states),
            )
        check()
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
