"""What Ray Serve runs: the ASGI application, once in each replica.

`build` is what a Serve configuration names as its `import_path`; `serve --engine ray` comes here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.config.serve import API_KEY_VARIABLE, ServeConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.extras import require

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "qwen-vl-classifier"
"""The name of the application in Ray Serve."""

DEPLOYMENT = "classifiers"
"""The name of its one deployment."""

MOST_TRIES = 2
"""How often a replica is started before it counts as broken: a folder that cannot be loaded does not get better."""

CLOSE_SECONDS = 5.0
"""For a replica to end, after those that its requests have to finish."""

_HEALTH_SECONDS = 5.0  # between two looks at a replica
_DRAIN_TICK = 0.2  # seconds between two looks at the requests of a replica that is to end
_LOAD_TICK = 0.05
_RETRY_SECONDS = 1
_SWITCH_SECONDS = 0.0005  # as in `http/server.py`


def build(options: Mapping[str, Any]) -> Any:
    """Make the application for Ray Serve.

    Args:
        options: Fields of `ServeConfig` by name. Of `host`, it counts here whether only this machine reaches it: then
            calls by other names are refused, and no API key is demanded.

    Returns:
        What `serve.run` takes, and what `import_path` of a Serve configuration may name.

    Raises:
        ConfigError: An option that is not known, or a value out of its range.
        MissingExtraError: The extras "serve" and "scale" are not installed.

    Example:
        >>> serve.run(build({"classifiers": ["runs/claims"], "replicas": "1:4"}))  # doctest: +SKIP
    """
    known = {item.name for item in dataclasses.fields(ServeConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"{name}: not an option of serve; see qwen-vl-classifier serve --help-all")
    classifiers = options.get("classifiers", ())
    if isinstance(classifiers, str) or not all(isinstance(folder, str) for folder in classifiers):
        raise ConfigError(f"classifiers {classifiers!r}: give a list of folders")
    return application(ServeConfig(**{**options, "classifiers": tuple(classifiers), "engine": "ray"}))


def application(config: ServeConfig, *, locked: bool = False) -> Any:
    """Make the application for Ray Serve, to which this process is connected.

    Args:
        config: What to serve and how.
        locked: Whether a replica that finds no API key must not start.
    """
    require("fastapi", extra="serve")
    ray = require("ray", extra="scale")
    serve = require("ray.serve", extra="scale")
    fewest, most = config.replica_bounds
    resources = ray.cluster_resources()
    on_gpus = config.device == "cuda" or (config.device == "auto" and resources.get("GPU", 0) > 0)
    # While a new version comes up, its replicas stand beside those of the old one.
    beside = 2 if config.ray_address else 1
    cpus = 1 if on_gpus else max(1, int(resources.get("CPU", 1)) // (most * beside))
    most_ongoing = config.queue_size + config.max_batch  # as the replica's own admission has it
    scaling: dict[str, Any] = {"num_replicas": fewest}
    if most > fewest:
        autoscaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": config.max_batch}
        scaling = {"autoscaling_config": autoscaling}
    deployment = serve.deployment(
        serve.ingress()(Classifiers),
        name=DEPLOYMENT,
        max_ongoing_requests=most_ongoing,
        max_queued_requests=config.queue_size,
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_SECONDS},
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(on_gpus)},
        graceful_shutdown_timeout_s=config.grace + CLOSE_SECONDS,
        graceful_shutdown_wait_loop_s=_DRAIN_TICK,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=MOST_TRIES,
        max_surge_percent=100,  # a replica ends once another with the new version is ready
        logging_config={"enable_access_log": False, "log_level": "WARNING"},  # the service has a log of its own
        **scaling,
    )
    fields = dataclasses.asdict(dataclasses.replace(config, device="auto" if on_gpus else "cpu"))
    return deployment.bind(fields, locked)


class Classifiers:
    """The service in the process of a replica.

    Args:
        fields: Those of its `ServeConfig`, which is checked once more: what holds on the machine of the one who deploys
            may not hold here.
        locked: Whether it must not start without an API key.
    """

    def __init__(self, fields: dict[str, Any], locked: bool) -> None:
        self._config = ServeConfig(**fields)
        self._locked = locked
        self._ending = contextlib.AsyncExitStack()
        self._app: FastAPI

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Load the classifiers and warm up; only then does Ray send requests here."""
        from qwen_vl_classifier.serving.app import Shared, create_app
        from qwen_vl_classifier.serving.http.access import read_keys
        from qwen_vl_classifier.serving.observability.logs import logging_to_stderr
        from qwen_vl_classifier.serving.observability.prometheus import Metrics

        replica = require("ray.serve", extra="scale").get_replica_context().replica_id.unique_id
        self._ending.enter_context(logging_to_stderr(self._config.log_format, fields={"replica": replica}))
        keys = read_keys(self._config)
        if self._locked and keys.clients is None:
            raise ConfigError(
                f"a replica found no API key; set {API_KEY_VARIABLE} on all machines of the cluster, or give "
                "--api-key-file and a file that exists on all"
            )
        sys.setswitchinterval(_SWITCH_SECONDS)
        failures: list[Exception] = []
        # A caller of /metrics reaches any of the replicas: by its label each has series of its own.
        shared = Shared(keys, Metrics(labels={"replica": replica}), others_loaded=lambda: asyncio.sleep(0))
        app = create_app(self._config, on_failure=failures.append, shared=shared)
        await self._ending.enter_async_context(app.router.lifespan_context(app))
        while not failures and app.state.service.state in ("loading", "warming"):
            await asyncio.sleep(_LOAD_TICK)
        if failures:
            raise failures[0]
        app.router.lifespan_context = _begun
        self._app = app
        return app

    async def check_health(self) -> None:
        """Let Ray replace this replica where only a restart may help, as `/livez` has it.

        Raises:
            RefusedError: It has failed, or is stuck.
        """
        from qwen_vl_classifier.serving.routes.operations import check_alive

        check_alive(self._app.state.service)

    async def __del__(self) -> None:
        """End what runs; Ray calls this once the requests are answered."""
        await self._ending.aclose()


@contextlib.asynccontextmanager
async def _begun(_app: FastAPI) -> AsyncIterator[None]:
    """Do nothing: the application has begun already, so that its errors tell why it did not."""
    yield
