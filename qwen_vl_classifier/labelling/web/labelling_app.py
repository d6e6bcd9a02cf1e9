"""The application of `label`: what the page asks for, for this machine and whoever started the program alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from qwen_vl_classifier.extras import require

require("fastapi", extra="serve")  # before anything that imports it, so that a missing extra is named

from fastapi import FastAPI  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from qwen_vl_classifier.labelling.web import labelling_routes  # noqa: E402
from qwen_vl_classifier.labelling.web.browser_token import BrowserToken, TokenCheck  # noqa: E402
from qwen_vl_classifier.labelling.web.labelling_state import LabellingService  # noqa: E402
from qwen_vl_classifier.serving.http.access import (  # noqa: E402
    LOOPBACK_NAMES,
    CrossSiteCheck,
    HostCheck,
    SecurityHeaders,
)
from qwen_vl_classifier.serving.http.problems import Defects, add_handlers  # noqa: E402

_ADVICE = "open the address that the command printed in the terminal"


class NotCounted:
    """Stands where a server counts what it refuses: nobody looks at metrics of a page for one person."""

    def rejected(self, code: str) -> None:
        """Count a refusal."""


def create_labelling_app(labelling: LabellingService, token: BrowserToken) -> FastAPI:
    """Make the ASGI application that asks people for labels.

    Args:
        labelling: What it asks, and what it does with answers.
        token: What the browser must have.

    Raises:
        MissingExtraError: The extra "serve" is not installed.
    """
    app = FastAPI(
        lifespan=_lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(HostCheck, names=LOOPBACK_NAMES, advice=_ADVICE),
            Middleware(CrossSiteCheck, origins=(), advice=_ADVICE),
            Middleware(TokenCheck, token=token),
            Middleware(Defects),
        ],
    )
    app.state.metrics = NotCounted()
    app.state.service = labelling
    app.include_router(labelling_routes.router)
    add_handlers(app)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    labelling: LabellingService = app.state.service
    try:
        await labelling.pictures.start()
        yield
    finally:
        labelling.drain()
        await labelling.pictures.close()
