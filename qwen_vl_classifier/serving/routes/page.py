"""The page at `/`, what it consists of, and the page of the interface at `/docs`.

Nothing is read from a path that a request names: the files are a fixed table, and anything else is not found. All of
it stands under a policy that lets the pages load only what this server gives, and run only its own script files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined

from qwen_vl_classifier.config.serve import API_KEY_VARIABLE, ServeConfig
from qwen_vl_classifier.serving.reference import describe_interface

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)

ASSETS = {
    "style.css": "text/css; charset=utf-8",
    "docs.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        (
            "app.js",
            "dom.js",
            "example.js",
            "heatmap.js",
            "history.js",
            "pictures.js",
            "results.js",
            "server.js",
            "snippets.js",
            "texts.js",
        ),
        "text/javascript; charset=utf-8",
    ),
}
"""Files of the page by name, each with its media type."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    """Show the page on which a picture and a text can be tried."""
    config: ServeConfig = request.app.state.service.config
    content = (
        _environment()
        .get_template("index.html")
        .render(
            config=config,
            key_variable=API_KEY_VARIABLE if request.app.state.locked else "",
        )
    )
    return _answer(request, content.encode(), "text/html; charset=utf-8")


@router.get("/docs")
def docs(request: Request) -> Response:  # in a thread: the first time takes as long as many requests
    """Show the interface in words: every route with what it takes and what it answers."""
    content = _render_docs(request.app, str(request.base_url).rstrip("/"))
    return _answer(request, content, "text/html; charset=utf-8")


@functools.lru_cache(maxsize=8)
def _render_docs(app: FastAPI, address: str) -> bytes:
    interface = describe_interface(app.openapi(), address=address, key_variable=API_KEY_VARIABLE)
    return _environment().get_template("docs.html").render(interface).encode()


def _asset(name: str, media_type: str) -> Any:
    async def asset(request: Request) -> Response:
        return _answer(request, _file(name).encode(), media_type)

    return asset


for _name, _media_type in ASSETS.items():
    router.add_api_route(f"/page/{_name}", _asset(_name, _media_type))


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    """Answer with a file, or with 304 where the browser has this very content (RFC 9110, section 13.1.2)."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        # Kept, but asked about each time: after an upgrade no page may run with half of its scripts old.
        "Cache-Control": "private, no-cache",
        "Content-Security-Policy": POLICY,
    }
    known = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


@functools.cache
def _environment() -> Environment:
    """Return the templates; what they are given is escaped."""
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_file),
    )


@functools.cache
def _file(name: str) -> str:
    return importlib.resources.files("qwen_vl_classifier.serving").joinpath("page", name).read_text(encoding="utf-8")
