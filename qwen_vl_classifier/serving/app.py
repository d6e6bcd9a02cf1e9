"""The application: layers, routes and errors around a `Service`.

`create_app` builds it without loading anything. Its lifespan loads the classifiers in the background, so that the
health routes answer at once, and on the way out finishes every request that was accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.extras import require

require("fastapi", extra="serve")  # before anything that imports it, so that a missing extra is named

from starlette.middleware import Middleware  # noqa: E402

import qwen_vl_classifier  # noqa: E402
from qwen_vl_classifier.serving.http.access import Keys, access_layers, read_keys  # noqa: E402
from qwen_vl_classifier.serving.http.openapi import Application  # noqa: E402
from qwen_vl_classifier.serving.http.problems import Defects, add_handlers  # noqa: E402
from qwen_vl_classifier.serving.observability.middleware import Observability  # noqa: E402
from qwen_vl_classifier.serving.observability.prometheus import Metrics  # noqa: E402
from qwen_vl_classifier.serving.routes import (  # noqa: E402
    administration,
    classification,
    decisions,
    explanations,
    moderations,
    operations,
    page,
)
from qwen_vl_classifier.serving.service import Service  # noqa: E402

if TYPE_CHECKING:
    from fastapi import FastAPI

_ROUTES = (page, classification, explanations, moderations, decisions, operations, administration)


@dataclass(frozen=True, slots=True)
class Shared:
    """What several processes behind one address have in common.

    Attributes:
        keys: What `read_keys` returned to the first of them.
        metrics: Where they count.
        others_loaded: As for `Service`.
    """

    keys: Keys
    metrics: Metrics
    others_loaded: Callable[[], Awaitable[object]]


def create_app(
    config: ServeConfig,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[Exception], None] | None = None,
    shared: Shared | None = None,
) -> FastAPI:
    """Make the ASGI application that serves classifiers.

    Args:
        config: What to serve and how. Host and port are for the program that runs the application; if the host is
            loopback, calls by other names are refused.
        on_ready: Called in the event loop once requests are answered.
        on_failure: Called in the event loop when the classifiers cannot be loaded, or when the loop that makes
            batches fails by a defect; the default logs it. Either way the application then answers 503, `/livez`
            included.
        shared: What this process has in common with others that serve the same; `None` where it is alone.

    Raises:
        ConfigError: No classifiers, two of the same name, a key file that holds no key, or an invalid origin.
        MissingExtraError: The extra "serve" is not installed.

    Example:
        >>> app = create_app(ServeConfig(classifiers=("runs/claims",)))
        >>> app.state.service.state
        'loading'
    """
    keys = shared.keys if shared else read_keys(config)
    counted = shared.metrics if shared else Metrics()
    app = Application(
        title="qwen-vl-classifier",
        version=qwen_vl_classifier.__version__,
        lifespan=_lifespan,
        # The framework's pages would load scripts from elsewhere, and a redirect would believe the Host header.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Observability, metrics=counted),
            *access_layers(config, keys),
            Middleware(Defects),
        ],
    )
    app.state.metrics = counted
    app.state.service = Service(
        config,
        metrics=counted,
        on_ready=on_ready,
        on_failure=on_failure,
        others_loaded=shared.others_loaded if shared else None,
    )
    app.state.locked = keys.clients is not None
    app.state.is_alone = shared is None and config.engine != "ray"
    for routes in _ROUTES:
        app.include_router(routes.router)
    add_handlers(app)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    loading = asyncio.create_task(service.load())
    try:
        yield
    finally:
        await service.close()
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
