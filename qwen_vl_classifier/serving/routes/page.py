"""The page at `/`, what it consists of, and the page of the interface at `/docs`.

Nothing is read from a path that a request names: the files are a fixed table, and anything else is not found. The
pictures to try first are drawn here, so that they are nobody's. All of it stands under a policy that lets the pages
load only what this server gives, and run only its own script files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import json
import shlex
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, ServeConfig
from qwen_vl_classifier.files.pages import page_file, page_templates
from qwen_vl_classifier.scenes.statements import scene_examples
from qwen_vl_classifier.serving.items import MAX_IMAGES

_PAGE = "serving/page"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

EXAMPLES = tuple(f"example-{number}.png" for number in range(1, 9))
"""Names of the pictures to try first."""


def _files(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for file in folder.iterdir():
        if file.is_dir():
            yield from _files(file, f"{prefix}{file.name}/")
        else:
            yield prefix + file.name


ASSETS = {
    name: media_type
    for name in sorted(_files(importlib.resources.files("qwen_vl_classifier").joinpath(_PAGE)))
    if (media_type := _MEDIA_TYPES.get(PurePath(name).suffix))
}
"""Files of the page by their path below its folder, each with its media type."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    """Show the page on which a picture and a text can be tried."""
    config: ServeConfig = request.app.state.service.config
    content = (
        page_templates(_PAGE)
        .get_template("index.html")
        .render(
            config=config,
            max_images=MAX_IMAGES,
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
    templates = page_templates(_PAGE)
    templates.filters["json"] = functools.partial(json.dumps, ensure_ascii=False, indent=2)
    templates.filters["quoted"] = shlex.quote
    page = templates.get_template("docs/docs.html")
    variables = {
        "key_variable": API_KEY_VARIABLE,
        "admin_key_variable": ADMIN_KEY_VARIABLE,
        "locked": app.state.locked,
    }
    return page.render(app.openapi(), address=address, **variables).encode()


@router.get("/page/examples.json")
def examples(request: Request) -> Response:  # in a thread, as the pictures: they are drawn the first time
    """List pictures to try first, each with a text that is true of it or false."""
    listed = [{"name": name, "text": text} for name, (_, text) in _examples().items()]
    return _answer(request, json.dumps(listed).encode(), "application/json")


@functools.cache
def _examples() -> dict[str, tuple[bytes, str]]:
    """Draw the pictures as PNG, each with a text; as far as scenes allow, texts are true and false in turn."""
    drawn: dict[str, tuple[bytes, str]] = {}
    scenes = scene_examples("evaluation", scenes=len(EXAMPLES), per_scene=2, kinds=("existence",))
    for name, (picture, _, made) in zip(EXAMPLES, scenes, strict=True):
        content = io.BytesIO()
        picture.save(content, "PNG")
        fitting = [statement for statement in made if statement.label == len(drawn) % 2] or made
        drawn[name] = (content.getvalue(), fitting[0].text)
    return drawn


def _example(name: str) -> Any:
    def example(request: Request) -> Response:
        return _answer(request, _examples()[name][0], "image/png")

    return example


def _asset(name: str, media_type: str) -> Any:
    async def asset(request: Request) -> Response:
        return _answer(request, page_file(_PAGE, name).encode(), media_type)

    return asset


for _name, _media_type in ASSETS.items():
    router.add_api_route(f"/page/{_name}", _asset(_name, _media_type))
for _name in EXAMPLES:
    router.add_api_route(f"/page/examples/{_name}", _example(_name))


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
